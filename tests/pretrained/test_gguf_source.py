"""GGUF files as a source: blocks against naive loops, networks by value, fields that are used or refused."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import HEAD, HEADS, HIDDEN, KEY_HEADS, LAYERS, WIDTH, network_tensors, write_gguf, write_model

from mod_star.config import ModelConfig
from mod_star.errors import InputError
from mod_star.pretrained import gguf_source
from mod_star.pretrained.build import build_params
from mod_star.pretrained.gguf_config import read_gguf_config
from mod_star.pretrained.gguf_header import read_gguf
from mod_star.pretrained.gguf_source import dequantised, open_gguf
from mod_star.pretrained.importing import import_model, open_source
from mod_star.runs.directory import load_run
from mod_star.tokenization import HuggingFaceTokenizer


def half(raw: bytes) -> float:
    return struct.unpack("<e", raw)[0]


def naive_block(kind: str, raw: bytes) -> Sequence[float]:
    """The numbers of one block, one by one, as ggml's documentation lays it out."""
    if kind == "Q8_0":
        return [half(raw[:2]) * value for value in struct.unpack("32b", raw[2:])]
    if kind in ("Q4_0", "Q4_1"):
        offset = half(raw[2:4]) if kind == "Q4_1" else -8 * half(raw[:2])
        quarters = raw[4:] if kind == "Q4_1" else raw[2:]
        values = [byte & 15 for byte in quarters] + [byte >> 4 for byte in quarters]
        return [half(raw[:2]) * value + offset for value in values]
    if kind in ("Q5_0", "Q5_1"):
        start = 4 if kind == "Q5_1" else 2
        offset = half(raw[2:4]) if kind == "Q5_1" else -16 * half(raw[:2])
        high, quarters = struct.unpack("<I", raw[start : start + 4])[0], raw[start + 4 :]
        low = [byte & 15 for byte in quarters] + [byte >> 4 for byte in quarters]
        return [half(raw[:2]) * (value | (high >> i & 1) << 4) + offset for i, value in enumerate(low)]
    if kind == "Q6_K":
        found: list[float] = []
        low_bits, high_bits, scales, scale = (
            raw[:128],
            raw[128:192],
            struct.unpack("16b", raw[192:208]),
            half(raw[208:]),
        )
        for i in range(256):
            part, within = divmod(i, 128)
            quarter, column = divmod(within, 32)
            byte = low_bits[64 * part + 32 * (quarter % 2) + column]
            bits = byte >> 4 if quarter >= 2 else byte & 15
            bits |= (high_bits[32 * part + column] >> 2 * quarter & 3) << 4
            found.append(scale * scales[i // 16] * (bits - 32))
        return found
    assert kind == "Q4_K"
    scale, least, packed, quarters = half(raw[:2]), half(raw[2:4]), raw[4:16], raw[16:]
    found = []
    for i in range(256):
        j = i // 32
        if j < 4:
            step, offset = packed[j] & 63, packed[j + 4] & 63
        else:
            step = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            offset = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        byte = quarters[32 * (j // 2) + i % 32]
        found.append(scale * step * (byte >> 4 if j % 2 else byte & 15) - least * offset)
    return found


def random_blocks(kind: Kind, count: int) -> np.ndarray:
    """Bytes [count, bytes of a block] whose scales, wherever they are, are small numbers."""
    raw = np.random.default_rng(1).integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    scales = {"Q6_K": [208], "Q4_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}.get(kind.name, [0])
    for at in scales:
        raw[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_blocks_equal_a_naive_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "_ELEMENTS_AT_ONCE", 512)  # several pieces, the last one not full
    kind, raw = Kind[name], random_blocks(Kind[name], 35)
    size = gguf.GGML_QUANT_SIZES[kind][0]
    found = dequantised(raw.reshape(-1), kind, (5, 7 * size))
    assert found.dtype == np.float32
    expected = np.array([naive_block(name, block.tobytes()) for block in raw])
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected.reshape(5, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_stored_types_come_back_as_near_as_they_can(tmp_path: Path, name: str) -> None:
    tensors = {"a": np.random.default_rng(2).normal(0, 1, (3, 64)).astype(np.float32)}
    file = read_gguf(write_gguf(tmp_path / "a.gguf", {}, tensors, {"a": Kind[name]}))
    place = file.tensors["a"]
    found = dequantised(file.data[place.start : place.start + place.size], place.kind, place.shape)
    expected_type = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(name, np.float32)
    assert found.dtype == expected_type
    # Half a step of the coarsest block: 1/16 or 1/32 of about 6, 1/256, or the rounding of a 16-bit number.
    bound = {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q5_0": 0.2, "Q5_1": 0.15, "Q4_0": 0.4, "Q4_1": 0.25}[name]
    assert 0 < np.abs(found.astype(np.float32) - tensors["a"]).max() < bound


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter makes of a projection's rows: of each head, e and e + E/2 side by side."""
    size = len(rows) // heads
    order = [h * size + e + part * (size // 2) for h in range(heads) for e in range(size // 2) for part in (0, 1)]
    return rows[order]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_tensor_is_in_its_place(tmp_path: Path, architecture: str) -> None:
    path = write_model(tmp_path / "model.gguf", architecture)
    written = network_tensors(len(read_gguf(path).metadata["tokenizer.ggml.tokens"]), architecture)
    stored = dict(written)
    if architecture == "llama":
        for layer in range(LAYERS):
            for name, heads in (("attn_q", HEADS), ("attn_k", KEY_HEADS)):
                stored[f"blk.{layer}.{name}.weight"] = interleaved(written[f"blk.{layer}.{name}.weight"], heads)
    source = open_gguf(write_model(path, architecture, tensors=stored))
    assert source.family == architecture
    params: dict[str, Any] = build_params(source)
    np.testing.assert_array_equal(params["embedding"], written["token_embd.weight"])
    np.testing.assert_array_equal(params["head"], written["output.weight"])
    np.testing.assert_array_equal(params["final_norm"], written["output_norm.weight"])
    block = params["groups"]["full_0"]["block"]
    for layer in range(LAYERS):
        mine = jax.tree.map(lambda leaf, layer=layer: leaf[layer], block)
        theirs = {name.split(".", 2)[2]: array for name, array in written.items() if name.startswith(f"blk.{layer}.")}
        expected = {
            "attention_norm": theirs.pop("attn_norm.weight"),
            "query": theirs.pop("attn_q.weight").T.reshape(WIDTH, HEADS, HEAD),
            "key": theirs.pop("attn_k.weight").T.reshape(WIDTH, KEY_HEADS, HEAD),
            "value": theirs.pop("attn_v.weight").T.reshape(WIDTH, KEY_HEADS, HEAD),
            "output": theirs.pop("attn_output.weight").T.reshape(HEADS, HEAD, WIDTH),
            "feed_forward_norm": theirs.pop("ffn_norm.weight"),
            "feed_forward": {name: theirs.pop(f"ffn_{name}.weight").T for name in ("gate", "up", "down")},
        }
        if architecture == "qwen2":
            for name, heads in (("query", HEADS), ("key", KEY_HEADS), ("value", KEY_HEADS)):
                expected[f"{name}_bias"] = theirs.pop(f"attn_{name[0]}.bias").reshape(heads, HEAD)
        if architecture == "qwen3":
            expected |= {"query_norm": theirs.pop("attn_q_norm.weight"), "key_norm": theirs.pop("attn_k_norm.weight")}
        assert not theirs
        jax.tree.map(np.testing.assert_array_equal, mine, expected)


def test_configuration(tmp_path: Path) -> None:
    source = open_gguf(write_model(tmp_path / "a.gguf", tensors={"output.weight": None}))
    expected = ModelConfig(
        vocab_size=source.tensors["model.embed_tokens.weight"].shape[0], width=WIDTH, layers=LAYERS, heads=HEADS,
        kv_heads=KEY_HEADS, mlp_width=HIDDEN, context=128, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True,
    )  # fmt: skip
    assert source.config == expected
    assert source.tokenizer.end_ids == (2, 0)
    fields = {
        "llama.attention.sliding_window": 64,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.attention.head_count_kv": [KEY_HEADS] * LAYERS,
        "llama.expert_count": 0,
        "llama.expert_shared_count": 0,
        "llama.nextn_predict_layers": 0,
        "general.sampling.temp": 0.6,
    }
    source = open_gguf(write_model(tmp_path / "b.gguf", metadata=fields))
    assert source.family == "mistral"
    changes: dict[str, Any] = {
        "sliding_window": 64,
        "rope_scaling": "linear",
        "rope_factor": 4.0,
        "tie_embeddings": False,
    }
    assert source.config == dataclasses.replace(expected, **changes)


def published_factors(theta: float, size: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What a frequency is divided by in Llama 3.1, by wavelengths, as llama.cpp's converter stores it."""
    found = []
    for i in range(size // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / size)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 0.5, 6.0, 8192), (8.0, 1.0, 4.0, 4096)],
)
def test_frequency_factors_of_llama_3(tmp_path: Path, factor: float, low: float, high: float, original: int) -> None:
    width = 64 * HEADS
    factors = published_factors(5e5, 64, factor, low, high, original)
    assert 1 < len(np.unique(factors)) < 32
    rows = len(read_gguf(write_model(tmp_path / "a.gguf")).metadata["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": np.zeros((rows, width), np.float32), "rope_freqs.weight": factors}
    for layer in range(LAYERS):
        tensors[f"blk.{layer}.attn_q.weight"] = np.zeros((width, width), np.float32)
        tensors[f"blk.{layer}.attn_k.weight"] = np.zeros((KEY_HEADS * 64, width), np.float32)
    fields = {"llama.embedding_length": width, "llama.rope.dimension_count": 64, "llama.rope.freq_base": 5e5}
    source = open_gguf(write_model(tmp_path / "b.gguf", metadata=fields, tensors=tensors))
    config = source.config
    assert (config.rope_scaling, config.rope_factor) == ("llama3", factor)
    # Only the ratios of these three mean something.
    ratios = np.array([config.rope_low_freq_factor, config.rope_high_freq_factor]) / config.rope_original_context
    np.testing.assert_allclose(ratios, np.array([low, high]) / original, rtol=1e-3)
    assert "rope_freqs.weight" not in source.tensors
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 32, dtype=np.float32)
    with pytest.raises(InputError, match=r"rope_freqs.weight is not the scaling of Llama 3 but 1, "):
        open_gguf(write_model(tmp_path / "c.gguf", metadata=fields, tensors=tensors))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", None, "general.architecture = None: is not supported; there are llama, qwen2, qwen3"),
        ("general.type", "adapter", "general.type = 'adapter': must be 'model'"),
        ("split.count", 3, "split.count = 3: must be 1; put its parts together"),
        ("general.type", [1, 2], "general.type = array([1, 2], dtype=int32): must be 'model'"),
        ("split.count", [1, 2], "split.count = array([1, 2], dtype=int32): must be 1"),
        ("llama.block_count", None, "has no llama.block_count"),
        ("llama.block_count", 2**31, "llama.block_count = 2147483648: the file has tensors of 2 blocks"),
        ("llama.block_count", "2", "llama.block_count = '2': must be a whole number"),
        ("llama.embedding_length", 0, "llama.embedding_length = 0: must be a whole number, at least 1"),
        ("llama.attention.head_count", 3, "llama.rope.dimension_count = 8: must be the width of a query's head, 10"),
        ("llama.attention.head_count_kv", [2, 1], "layers that differ are not supported"),
        ("llama.attention.head_count_kv", 3, "model.kv_heads = 3: must be a divisor of model.heads = 4"),
        ("llama.vocab_size", 5, "llama.vocab_size = 5: token_embd.weight has"),
        ("llama.rope.dimension_count", 4, "llama.rope.dimension_count = 4: must be the width of a query's head, 8"),
        ("llama.attention.layer_norm_rms_epsilon", math.nan, "layer_norm_rms_epsilon = nan: must be a positive"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type = 'yarn': is not supported"),
        ("llama.rope.scaling.type", [1, 2], "llama.rope.scaling.type = array([1, 2], dtype=int32): is not supported"),
        ("llama.rope.scaling.factor", 2.0, "llama.rope.scaling.factor = 2.0: must be 1 with"),
        ("llama.expert_count", 8, "llama.expert_count = 8: is not supported; must be 0"),
        ("llama.logit_scale", 0.5, "llama.logit_scale = 0.5: is not supported"),
        ("llama.attention.causal", False, "llama.attention.causal = False: is not supported"),
        ("llama.attention.sliding_window_pattern", 2, "sliding_window_pattern = 2: is a field that mod-star"),
        ("llama.surprise", "x", "llama.surprise = 'x': is a field that mod-star does not know"),
    ],
)  # fmt: skip
def test_fields_are_used_or_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "model.gguf"
    if key == "general.architecture":  # the package always writes one
        write_gguf(path, {}, {}, architecture="bert")
        message = message.replace("None", "'bert'")
    else:
        write_model(path, metadata={key: value})
    with pytest.raises(InputError) as error:
        open_gguf(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", [np.zeros(2), np.full(99, 1.2345678901234567e100), ["llama"], 3])
def test_an_architecture_that_is_no_name(tmp_path: Path, architecture: Any) -> None:
    file = read_gguf(write_model(tmp_path / "model.gguf"))
    file = dataclasses.replace(file, metadata={**file.metadata, "general.architecture": architecture})
    with pytest.raises(InputError) as error:
        read_gguf_config(file)
    message = str(error.value)
    assert message.startswith(f"{file.path}: general.architecture = ") and "; there are llama, qwen2" in message
    assert "\n" not in message and len(message) < len(str(file.path)) + 200


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    for tensors, message in (
        ({"token_embd.weight": None}, "has no tensor 'token_embd.weight'"),
        ({"blk.1.ffn_up.weight": None}, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        ({"blk.1.ffn_up.weight": np.zeros((2, WIDTH), np.float32)}, "mlp.up_proj.weight has shape [2, 32], expected"),
        ({"blk.0.attn_q.weight": np.zeros((30, WIDTH), np.float32)}, "has 30 rows, and 4 heads of 8 need 32"),
        ({"blk.1.ffn_gate_exps.weight": np.zeros(2, np.float32)}, "tensor blk.1.ffn_gate_exps.weight of shape [2]"),
        ({"blk.0.ffn_up.weight": np.zeros((HIDDEN, WIDTH), np.int32)}, "'blk.0.ffn_up.weight' has type I32"),
    ):
        path = write_model(tmp_path / "model.gguf", tensors=tensors)
        with pytest.raises(InputError) as error:
            build_params(open_gguf(path))
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_an_imported_file_is_a_run_and_a_damaged_one_leaves_nothing(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "model.gguf", kinds={"token_embd.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.BF16}
    )
    source = open_source(str(path))
    import_model(source, tmp_path / "run", context=64)
    loaded = load_run(tmp_path / "run")
    assert loaded.config.model == dataclasses.replace(source.config, context=64)
    assert isinstance(loaded.tokenizer, HuggingFaceTokenizer)
    assert loaded.tokenizer.fingerprint == source.tokenizer.fingerprint
    assert loaded.tokenizer.end_ids == (2, 0)
    assert loaded.tokenizer.chat_template == source.tokenizer.chat_template
    jax.tree.map(np.testing.assert_array_equal, loaded.params, build_params(source))
    output: Any = loaded.decoder.apply(
        {"params": loaded.params}, np.array(loaded.tokenizer.encode("The quick"), np.int32)
    )
    assert np.isfinite(np.asarray(output.hidden)).all()

    holed = {"blk.1.ffn_down.weight": np.full((WIDTH, HIDDEN), np.nan, np.float32)}
    bad = write_model(tmp_path / "bad.gguf", tensors=holed)
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds values that are not"):
        import_model(open_source(str(bad)), tmp_path / "none")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.gguf", "model.gguf", "run"]
