"""Where training texts come from: a config for each kind of data."""

import dataclasses
from pathlib import Path
from typing import Literal

from finetune.corpus import TASKS
from finetune.facts import Stage
from finetune.records import TASKS as RECORD_TASKS
from finetune.sources import FileData, HubData
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class GeneratedData:
    """Tasks that code writes (`finetune.corpus`).

    Attributes:
        tasks: which, in turn.
        size: examples to train on.
        test_size: examples to test on; their questions are never among the former.
        seed: of the examples.
        chat: whether they become turns of the tokenizer's chat template.
    """

    type: Literal["generated"] = "generated"
    tasks: tuple[str, ...] = tuple(TASKS)
    size: int = 20_000
    test_size: int = 500
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0:
            raise InputError(f"size must be at least 1 and test_size at least 0, got {self.size} and {self.test_size}")


@dataclasses.dataclass(frozen=True)
class StoriesData:
    """Stories that code writes, of a known law (`finetune.stories`); for models with the tokenizer `stories`.

    Attributes:
        size: stories to train on.
        test_size: stories to test on.
        words: words of a story, each of which is a token.
        domains: whose laws, in turn.
        seed: of the stories.
    """

    type: Literal["stories"] = "stories"
    size: int = 2000
    test_size: int = 100
    words: int = 128
    domains: tuple[int, ...] = (0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0 or self.words < 2:
            raise InputError(
                f"size must be at least 1, test_size 0 and words 2, got {self.size}, {self.test_size} and {self.words}"
            )


@dataclasses.dataclass(frozen=True)
class RecordsData:
    """Questions on records, long to read and short to answer (`finetune.records`); for the tokenizer `stories`.

    Attributes:
        size: questions to train on.
        test_size: questions to test on.
        records: that each is asked of, 1 to 24; eight or nine words each.
        tasks: of `finetune.records.TASKS`, in turn.
        seed: of the records.
    """

    type: Literal["records"] = "records"
    size: int = 20_000
    test_size: int = 200
    records: int = 12
    tasks: tuple[str, ...] = RECORD_TASKS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0 or self.records < 1:
            raise InputError(
                f"size and records must be at least 1 and test_size 0, got {self.size}, {self.records} and "
                f"{self.test_size}"
            )


@dataclasses.dataclass(frozen=True)
class RecallData:
    """Facts to be recalled from texts of filler (`finetune.recall`); for models with the tokenizer `stories`.

    Attributes:
        size: texts to train on, in each of which every fact is asked for.
        test_size: texts to test on, with one question each.
        words: of a text, before its questions.
        facts: of a text.
        seed: of the texts.
    """

    type: Literal["recall"] = "recall"
    size: int = 20_000
    test_size: int = 200
    words: int = 64
    facts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0 or self.facts < 1 or self.words < 2 * self.facts:
            raise InputError("size and facts must be at least 1, test_size 0, and words twice the facts")


@dataclasses.dataclass(frozen=True)
class OthelloData:
    """Random games of Othello (`finetune.othello`); for models with the tokenizer `othello`.

    Attributes:
        size: games to train on, of about 61 tokens each.
        test_size: games to test on.
        turns: of each game, at most: openings are learnt much sooner than whole games; None: to the end.
        seed: of the games.
    """

    type: Literal["othello"] = "othello"
    size: int = 20_000
    test_size: int = 200
    turns: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0:
            raise InputError(f"size must be at least 1 and test_size at least 0, got {self.size} and {self.test_size}")
        if self.turns is not None and self.turns < 1:
            raise InputError(f"turns must be at least 1 (or null for whole games), got {self.turns}")


@dataclasses.dataclass(frozen=True)
class CodeData:
    """Descriptions, each with the Python function that it describes (`finetune.code_pairs`, `finetune.library_code`).

    Attributes:
        source: pairs that code writes, or those of the interpreter's own library.
        size: pairs to train on; of the library, at most.
        test_size: pairs to test on, likewise.
        seed: of the pairs that code writes.
    """

    type: Literal["code"] = "code"
    source: Literal["generated", "library"] = "generated"
    size: int = 8000
    test_size: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0:
            raise InputError(f"size must be at least 1 and test_size at least 0, got {self.size} and {self.test_size}")


@dataclasses.dataclass(frozen=True)
class FactsData:
    """Contexts of facts, and what is to be said of them (`finetune.facts`); for models that read contexts apart.

    Attributes:
        stage: what is to be said: the context again, what follows from it, or the answer to a question.
        size: examples to train on.
        test_size: examples to test on, of other contexts.
        facts: sentences of a context.
        seed: of the examples.
    """

    type: Literal["facts"] = "facts"
    stage: Stage = "restoration"
    size: int = 20_000
    test_size: int = 200
    facts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.test_size < 0 or self.facts < 1:
            raise InputError("size and facts must be at least 1, and test_size 0")


@dataclasses.dataclass(frozen=True)
class OwnTextsData:
    """Texts that the model wrote itself (`finetune.self_texts`); their prompts are read and not learnt.

    Attributes:
        texts: the folder of experiments.generate; its splits `train` and `test` are used.
        generate: the config of experiments.generate that the texts are written by where the folder does not exist, for
            the model that is trained; None: that is an error.
    """

    type: Literal["own_texts"] = "own_texts"
    texts: Path = Path("results/texts/smollm2-135m-instruct")
    generate: Path | None = Path("configs/generate/smollm2.yaml")


DataConfig = (
    GeneratedData
    | StoriesData
    | RecallData
    | RecordsData
    | OthelloData
    | CodeData
    | FactsData
    | OwnTextsData
    | FileData
    | HubData
)
