"""Every kind of draft head, for whoever trains, saves or loads one: `HEADS` is a literal table."""

from typing import Any

from decoding.speculative.chimera import CHIMERA_HEAD, ChimeraConfig
from decoding.speculative.clover import CLOVER_HEAD, CloverConfig
from decoding.speculative.draft_head import HeadKind
from decoding.speculative.eagle import EAGLE_HEAD, EagleConfig
from decoding.speculative.hidden_transfer import HIDDEN_TRANSFER_HEAD, HiddenTransferConfig
from decoding.speculative.medusa import MEDUSA_HEAD, MedusaConfig
from decoding.speculative.ppd import PPD_HEAD, PPDConfig

HEADS: dict[str, HeadKind] = {
    "chimera": CHIMERA_HEAD,
    "clover": CLOVER_HEAD,
    "eagle": EAGLE_HEAD,
    "hidden_transfer": HIDDEN_TRANSFER_HEAD,
    "medusa": MEDUSA_HEAD,
    "ppd": PPD_HEAD,
}
HeadConfig = MedusaConfig | ChimeraConfig | CloverConfig | EagleConfig | HiddenTransferConfig | PPDConfig


def kind_of(config: Any) -> HeadKind:
    """Returns the kind of head that settings are of."""
    return HEADS[config.type]
