"""All decoding methods by name: a new one adds its file and a line here."""

from decoding.autoregressive import GREEDY, SAMPLE
from decoding.entropy_adaptive import ENTROPY_ADAPTIVE
from decoding.grammar.constrained import CONSTRAINED
from decoding.knob import KNOB
from decoding.lexical_unit import LEXICAL_UNIT
from decoding.method import Method
from decoding.search.beam import BEAM
from decoding.search.contrastive import CONTRASTIVE
from decoding.search.diverse_beam import DIVERSE_BEAM
from decoding.sparse.core_infer import CORE_INFER
from decoding.sparse.lserve import LSERVE
from decoding.sparse.streaming import STREAMING
from decoding.sparse.tidal import TIDAL
from decoding.speculative.aded import ADED
from decoding.speculative.chimera import CHIMERA
from decoding.speculative.clover import CLOVER
from decoding.speculative.dyspec import DYSPEC
from decoding.speculative.eagle import EAGLE
from decoding.speculative.hidden_transfer import HIDDEN_TRANSFER
from decoding.speculative.lexical_unit_verified import LEXICAL_UNIT_VERIFIED
from decoding.speculative.medusa import MEDUSA
from decoding.speculative.ppd import PPD
from decoding.speculative.prompt_lookup import PROMPT_LOOKUP
from decoding.speculative.rapid import RAPID
from decoding.speculative.rsd import RSD_C, RSD_S
from decoding.speculative.specdec_pp import SPECDEC_PP
from decoding.speculative.speculative_sampling import SPECULATIVE_SAMPLING
from decoding.speculative.token_recycling import TOKEN_RECYCLING

METHODS: dict[str, Method] = {
    "greedy": GREEDY,
    "sample": SAMPLE,
    "aded": ADED,
    "beam": BEAM,
    "chimera": CHIMERA,
    "clover": CLOVER,
    "constrained": CONSTRAINED,
    "contrastive": CONTRASTIVE,
    "core_infer": CORE_INFER,
    "diverse_beam": DIVERSE_BEAM,
    "dyspec": DYSPEC,
    "eagle": EAGLE,
    "entropy_adaptive": ENTROPY_ADAPTIVE,
    "hidden_transfer": HIDDEN_TRANSFER,
    "knob": KNOB,
    "lexical_unit": LEXICAL_UNIT,
    "lexical_unit_verified": LEXICAL_UNIT_VERIFIED,
    "lserve": LSERVE,
    "medusa": MEDUSA,
    "ppd": PPD,
    "prompt_lookup": PROMPT_LOOKUP,
    "rapid": RAPID,
    "rsd_c": RSD_C,
    "rsd_s": RSD_S,
    "specdec_pp": SPECDEC_PP,
    "speculative_sampling": SPECULATIVE_SAMPLING,
    "streaming": STREAMING,
    "tidal": TIDAL,
    "token_recycling": TOKEN_RECYCLING,
}
