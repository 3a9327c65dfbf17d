"""Times this machine: `python -m experiments.bench --config configs/bench/decode.yaml`.

What is measured is the `type` of the config: `decode`, beside transformers (`experiments.bench_decoding`); `train`, a
LoRA update beside PEFT (`bench_train`); `long_text`, attention on a long text (`bench_text`); `core_infer`, what fewer
neurons save and cost (`bench_core_infer`); `constrained`, what grammars cost (`bench_constrained`); `isotropy`, hidden
states by layer and language (`bench_isotropy`). The last line printed is one JSON object.
"""

import sys

from experiments.bench_constrained import ConstrainedBenchConfig, bench_constrained
from experiments.bench_core_infer import CoreInferBenchConfig, bench_core_infer
from experiments.bench_decoding import BenchConfig, bench_decoding
from experiments.bench_isotropy import IsotropyBenchConfig, bench_isotropy
from experiments.bench_text import LongTextConfig, bench_text
from experiments.bench_train import TrainBenchConfig, bench_training
from experiments.config import chosen_type, load_config
from experiments.runtime import run_main


def main() -> None:
    """Measures what the config's `type` says."""
    kinds = {
        "train": (TrainBenchConfig, bench_training),
        "long_text": (LongTextConfig, bench_text),
        "core_infer": (CoreInferBenchConfig, bench_core_infer),
        "constrained": (ConstrainedBenchConfig, bench_constrained),
        "isotropy": (IsotropyBenchConfig, bench_isotropy),
    }
    kind, bench = kinds.get(chosen_type(sys.argv[1:]), (BenchConfig, bench_decoding))
    description = (
        "Times decoding here; or measures training, long texts, neurons, grammars or hidden states, by its `type`."
    )
    bench(load_config(kind, prog="python -m experiments.bench", description=description))


if __name__ == "__main__":
    run_main(main)
