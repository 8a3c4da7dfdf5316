"""A GGUF model of some hundred kilobytes that a real Ollama server runs like any other.

Its weights are random and it never ends an answer by itself: `num_predict: n` gives exactly n tokens, and with
`num_predict: -1` an answer goes on until the server's own limit, which is ten times the context: 163,840 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# Imported where a model is written: to ask for a real server takes neither.
if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

EMBEDDING = 64
BLOCKS = 2
FEED_FORWARD = 128
HEADS = 4
HEADS_KV = 1  # the server keeps the context of 64 slots in memory: so it is 128 MB
CONTEXT = 16384

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    f"\u2581{word}"
    for word in (
        "the",
        "sky",
        "is",
        "blue",
        "and",
        "light",
        "air",
        "far",
        "near",
        "so",
        "sun",
        "sea",
        "we",
        "see",
        "it",
    )
]
TOKENS = [*SPECIAL, *BYTES, *WORDS]

TEMPLATE = (
    "{{ if .System }}{{ .System }} {{ end }}"
    "{{ range .Messages }}{{ .Role }}: {{ .Content }} {{ end }}"
    "{{ if .Prompt }}{{ .Prompt }} {{ end }}{{ .Response }}"
)


def write_tiny_model(path: Path, *, blocks: int = BLOCKS, context: int = CONTEXT) -> None:
    """Write the model; the same bytes each time. Each block more is 140 kB."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _add_hyperparameters(writer, blocks, context)
    _add_tokenizer(writer)
    _add_tensors(writer, blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, blocks: int, context: int) -> None:
    import gguf

    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_vocab_size(len(TOKENS))
    # They are F32, but the number of that is 0, which the server takes for none and then does not quantize.
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    import gguf

    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * len(BYTES) + [gguf.TokenType.NORMAL] * len(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensors(writer: gguf.GGUFWriter, blocks: int) -> None:
    import numpy as np

    random = np.random.default_rng(0)

    def weights(*shape: int) -> npt.NDArray[np.float32]:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    embedding = weights(len(TOKENS), EMBEDDING)
    # The same large first number in every token: the blocks add little to it, so it is in the last hidden state too.
    embedding[:, 0] = 2
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", np.ones(EMBEDDING, dtype=np.float32))
    writer.add_tensor("output.weight", _output(embedding))
    for block in range(blocks):
        prefix = f"blk.{block}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}.{norm}.weight", np.ones(EMBEDDING, dtype=np.float32))
        for attention in ("attn_q", "attn_output"):
            writer.add_tensor(f"{prefix}.{attention}.weight", weights(EMBEDDING, EMBEDDING))
        for attention in ("attn_k", "attn_v"):
            writer.add_tensor(f"{prefix}.{attention}.weight", weights(EMBEDDING // HEADS * HEADS_KV, EMBEDDING))
        writer.add_tensor(f"{prefix}.ffn_gate.weight", weights(FEED_FORWARD, EMBEDDING))
        writer.add_tensor(f"{prefix}.ffn_up.weight", weights(FEED_FORWARD, EMBEDDING))
        writer.add_tensor(f"{prefix}.ffn_down.weight", weights(EMBEDDING, FEED_FORWARD))


def _output(embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The rows that turn the last hidden state into logits: about 30 for a word, 0 for all else, so an end never comes.

    A word's own embedding is taken off: none is likely to follow itself. (After 30 equal tokens in a row the server
    would end the answer.)
    """
    import numpy as np

    words = slice(-len(WORDS), None)
    output = np.zeros_like(embedding)
    output[words] = -embedding[words]
    output[words, 0] = 4
    return output
