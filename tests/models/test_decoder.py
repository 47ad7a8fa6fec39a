"""The decoder computes what transformers computes, in float32, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pd_serve.compute.cpu import ops
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.models.interface import HeadTransform
from pd_serve.models.layers import GroupedQueryAttention
from tests.models import reference

TOKENS = torch.randint(3, 320, (100,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_tiny_models_agree_with_transformers(family: str, tmp_path: Path) -> None:
    expected = reference.reference_logits(reference.make_tiny(family, tmp_path), TOKENS)
    found = reference.logits(reference.load(tmp_path), TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    found[0] = 0.0  # a sampler may


@pytest.mark.parametrize("family", ["llama3-rope", "gemma3", "qwen2"])
def test_the_older_form_of_config_json_gives_the_same_model(family: str, tmp_path: Path) -> None:
    expected = reference.reference_logits(reference.make_tiny(family, tmp_path), TOKENS)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if family == "gemma3":
        config |= {"rope_theta": rope["full_attention"]["rope_theta"], "sliding_window_pattern": 6}
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        del config["layer_types"]
    else:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = {"type" if k == "rope_type" else k: v for k, v in rope.items()}
    path.write_text(json.dumps(config))
    torch.testing.assert_close(reference.logits(reference.load(tmp_path), TOKENS), expected, atol=1e-4, rtol=1e-5)


def test_sharded_weights(tmp_path: Path) -> None:
    expected = reference.reference_logits(reference.make_tiny("llama", tmp_path, max_shard_size="100KB"), TOKENS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(reference.logits(reference.load(tmp_path), TOKENS), expected, atol=1e-4, rtol=1e-5)


def test_experts_that_are_fused_in_the_file(tmp_path: Path) -> None:
    model = reference.make_tiny("qwen3-moe", tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    expected = reference.reference_logits(model, TOKENS)
    torch.testing.assert_close(reference.logits(reference.load(tmp_path), TOKENS), expected, atol=1e-4, rtol=1e-5)


def test_text_half_of_a_multimodal_gemma3(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = reference.FAMILIES["gemma3"]().to_dict()
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    config.image_token_index = 319  # inside this tiny vocabulary
    model = Gemma3ForConditionalGeneration(config).float().eval()
    model.save_pretrained(tmp_path)
    tokens = TOKENS[TOKENS != 319]
    expected = reference.reference_logits(model, tokens)
    torch.testing.assert_close(reference.logits(reference.load(tmp_path), tokens), expected, atol=1e-4, rtol=1e-5)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    reference.make_tiny("gemma3", tmp_path)
    exact, rounded = (reference.logits(reference.load(tmp_path, dtype), TOKENS) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert (torch.nn.functional.cosine_similarity(exact, rounded, dim=-1) > 0.98).all()


def test_a_prompt_in_pieces_gives_the_same_hidden_states(tmp_path: Path) -> None:
    """Positions, not row numbers, decide; a decoder keeps nothing between calls."""
    reference.make_tiny("qwen3", tmp_path)
    decoder = reference.load(tmp_path)
    whole = decoder.forward(TOKENS, torch.arange(100), reference.dense_attention(decoder.config))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    mix = reference.mixer(decoder.config)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, transform: HeadTransform) -> Tensor:
        q, k = ops.transform_heads(q, k, positions, transform)
        if layer in seen:
            k, v = torch.cat((seen[layer][0], k)), torch.cat((seen[layer][1], v))
        seen[layer] = (k.clone(), v.clone())
        before = len(k) - len(q)
        return mix(layer, torch.cat((torch.zeros(before, *q.shape[1:]), q)), k, v)[before:]

    pieces = [decoder.forward(TOKENS[a:b], torch.arange(a, b), attend) for a, b in ((0, 60), (60, 99), (99, 100))]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_real_models_agree_with_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory: Path = request.getfixturevalue(model)
    # eager: transformers' plainest attention; its others differ from it by up to 0.005 here and there
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ours = reference.load(directory)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    for prompt in ("The capital of France is", "def f(x):\n    return", text[:3300]):
        tokens = torch.tensor(tokenizer(prompt)["input_ids"])
        rows = torch.cat((torch.arange(0, len(tokens), 29), torch.tensor([len(tokens) - 1])))
        with torch.inference_mode():
            expected = theirs(tokens[None], logits_to_keep=rows).logits[0].log_softmax(-1)
        hidden = ours.forward(tokens, torch.arange(len(tokens)), reference.dense_attention(ours.config))
        found = ours.logits(hidden[rows]).log_softmax(-1)
        assert (found.argmax(-1) == expected.argmax(-1)).all()
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
    assert len(tokens) > 600  # longer than Gemma's window


def test_max_positions_shortens_the_rope_tables_and_nothing_else(tmp_path: Path) -> None:
    reference.make_tiny("llama", tmp_path)
    decoder = load_decoder(tmp_path, ModelConfig.from_directory(tmp_path), "float32", ops=ops, max_positions=100)
    for length, of in ((100, decoder), (256, reference.load(tmp_path))):
        attention = of.weights.layers[0].attention
        assert isinstance(attention, GroupedQueryAttention) and len(attention.transform.cos_sin) == length
    torch.testing.assert_close(
        reference.logits(decoder, TOKENS), reference.logits(reference.load(tmp_path), TOKENS), atol=0, rtol=0
    )
