"""Methods that search: several texts of a prompt, or several candidates for a token, are weighed at each step."""
