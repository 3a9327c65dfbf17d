"""RAPID: a draft model that reads a short, retrieved context, and a target that leans towards it.

Source: "Long-Context Inference with Retrieval-Augmented Speculative Decoding" (2502.20330). The target reads the whole
context, the draft (`draft_prompts=` of a call) what `decoding.speculative.retrieval.shorten` keeps of it; so a draft as
large as the target, or larger, is still fast. Such a draft can be the better reader, so the target's law p is tilted
towards the draft's law q at the same place (one step down the gradient of T^2 KL(q || p) in the target's logits z):

    p_hat = softmax(z / T + eta * (q - p)),  p = softmax(z / T)

where the shift is 0 for tokens with q < alpha * max q. What is emitted, by mode:

    sd          speculative sampling: exact greedy text, or the law p
    rapid       the paper's rule: keep x where u q(x) < p_hat(x), else draw from norm((p - m)+), m = min(q, p_hat)
    tilt_exact  keep x where u q(x) < p_hat(x), else draw from norm((p_hat - q)+): the law p_hat at drafted places

In the last two the token behind a chain that was kept whole comes from p, as in the paper.

`rapid` is not lossless for eta > 0, though the paper claims so. The emitted law is

    out = m + (1 - sum m) norm((p - m)+)

and the paper's proof leaves the ( )+ out, as if m never exceeded p. But where both q > p and p_hat > p, which is where
the tilt acts, m > p, and (m, p and out over the tokens x)

    total variation(out, p) = sum_x (m(x) - p(x))+  exactly:

0 at eta = 0, and above 0 wherever a token is tilted up. Nor is out = p_hat. What the method changes in a text is this
bias. Acceptance, sum m, first grows with eta and then falls again, as p_hat overshoots q.

Notes: the guard for the tail is that of the released code (the paper sets p_hat back to p where p_hat is small, which
does not sum to 1). The released code also stops a chain early after an unlikely draft; here every chain is `length`
long. With filters (top-k, top-p, min-p, penalty) p and q are the filtered laws, and what the target may not draw stays
at 0. A draft with a temperature of its own tilts with the law that it draws from. Greedy rows have no law at T = 0 to
tilt: both laws are those at temperature 1, the most likely token of p_hat is kept or written, and the token behind a
whole chain is the target's own.

Axis letters: B batch, V vocabulary, A kept rows at most.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from decoding.method import Method, Steps
from decoding.sampling import draw, likeliest, step_keys
from decoding.speculative.draft_model import DraftOptions, check_draft
from decoding.speculative.loop import make_speculative
from decoding.speculative.speculative_sampling import chain_drafter
from decoding.speculative.target import Target, Verified, kept, normalised
from decoding.speculative.tree import TokenTree
from decoding.speculative.verify import Mode
from models.decoder import Decoder
from models.errors import InputError, unknown_name

RESIDUALS = {  # (p, q, p_hat) -> what a rejected token is replaced from, not normalised; and the law where it is all 0
    "rapid": lambda p, q, p_hat: (jnp.maximum(p - jnp.minimum(q, p_hat), 0.0), p),
    "tilt_exact": lambda p, q, p_hat: (jnp.maximum(p_hat - q, 0.0), p_hat),
}


@dataclasses.dataclass(frozen=True)
class RapidOptions(DraftOptions):
    """Tokens drafted per step; how they are verified; how far the target leans towards the draft (the paper: 5 to 20
    for a draft of the target's size, 40 to 50 for a larger one); and the share of the draft's likeliest token's
    probability below which a token is not tilted.
    """

    length: int = 10
    mode: Literal["sd", "rapid", "tilt_exact"] = "rapid"
    eta: float = 10.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {self.length}")
        if self.mode not in ("sd", *RESIDUALS):
            raise unknown_name("mode of method 'rapid'", self.mode, ("sd", *RESIDUALS))
        if self.mode == "sd" and (self.eta, self.alpha) != (RapidOptions.eta, RapidOptions.alpha):
            raise InputError("eta and alpha tilt the target's law, which mode sd does not: leave them out")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise InputError(f"eta must be 0 or more (0 does not tilt the target's law), got {self.eta}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be from 0 (tilt every token) to 1, got {self.alpha}")


def tilted(scores: jax.Array, q: jax.Array, eta: float, alpha: float) -> jax.Array:
    """Returns the scores of p_hat, f32[B, V].

    Args:
        scores: f32[B, V], those of the target's law p, divided by the temperature; -inf for what may not be drawn.
        q: f32[B, V], the draft's law at the same place.
        eta: how far p_hat leans towards q.
        alpha: tokens below this share of the highest q are not shifted.
    """
    guarded = q >= alpha * q.max(axis=-1, keepdims=True)
    return scores + jnp.where(guarded, eta * (q - jax.nn.softmax(scores, axis=-1)), 0.0)


def tilted_rule(mode: str, eta: float, alpha: float, tree: TokenTree, target: Target, most: int) -> Verified:
    """Verifies a chain against the tilted law; see `decoding.speculative.verify.verify` for the last three arguments.

    Its random numbers are those of `rrs_wor` on the same chain, so that with eta = 0 it keeps and writes the same.
    """
    batch = len(tree.tokens)
    index, zero = jnp.arange(batch), jnp.zeros((batch,), jnp.int32)
    keys = step_keys(target.keys, target.lengths)
    greedy = target.sampling.temperature == 0
    warm = target._replace(
        sampling=target.sampling.replace(temperature=jnp.where(greedy, 1.0, target.sampling.temperature))
    )

    def trial(row, carry):
        count, last_law = carry
        tried = count == row + 1
        scores, q = warm.scores(tree, zero + row), tree.law_behind(zero + row)
        shifted = tilted(scores, q, eta, alpha)
        p, p_hat, best = jax.nn.softmax(scores, axis=-1), jax.nn.softmax(shifted, axis=-1), likeliest(shifted)
        token = tree.tokens[:, row + 1]
        uniform = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in, (0, None))(keys, row + 1))
        accepted = jnp.where(greedy, token == best, uniform * q[index, token] < p_hat[index, token])
        left = normalised(*RESIDUALS[mode](p, q, p_hat))
        left = jnp.where(greedy[:, None], jax.nn.one_hot(best, p.shape[1], dtype=p.dtype), left)
        last_law = jnp.where((tried & ~accepted)[:, None], left, last_law)
        return count + (tried & accepted).astype(jnp.int32), last_law

    def step(carry, row):
        return jax.lax.cond((carry[0] == row + 1).any(), lambda: trial(row, carry), lambda: carry), None

    start = (zero + 1, jnp.zeros((batch, target.logits.shape[-1]), jnp.float32))
    (count, law), _ = jax.lax.scan(step, start, jnp.arange(most - 1))
    whole = count == most
    law = jax.lax.cond(
        whole.any(), lambda: jnp.where(whole[:, None], target.law(tree, zero + (most - 1)), law), lambda: law
    )
    place = jnp.arange(most)[None, :]
    rows = jnp.where(place < count[:, None], place, 0)
    return kept(tree, rows, count, draw(jnp.log(law), jax.vmap(jax.random.fold_in, (0, None))(keys, 0)))


def rule(options: RapidOptions) -> Mode:
    """Returns how the options verify a chain."""
    return (
        "rrs_wor" if options.mode == "sd" else functools.partial(tilted_rule, options.mode, options.eta, options.alpha)
    )


def make_rapid(model: Decoder, options: RapidOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts a chain of `options.length` tokens with `options.draft`, which may read a prompt of its own."""
    draft = check_draft(model, options.draft, "rapid")
    drafter = chain_drafter(draft, options.length, options.draft_temperature, rule(options))
    return make_speculative(model, drafter, stop_tokens)


RAPID = Method("lossy", RapidOptions, make_rapid, temperature=0.0, drafts=True)
