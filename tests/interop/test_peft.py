"""Merge adapters that peft itself made and saved, and hold the weights to its own merge_and_unload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcache as qc

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

#: peft sums a product in another order: a few roundings of float32 of weights around 1
CLOSE = {"rtol": 0, "atol": 2e-5}


def _llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=False))


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (_llama, {"target_modules": LINEAR}),
    "rslora": (_llama, {"target_modules": LINEAR, "use_rslora": True, "r": 5}),
    "patterns": (
        _llama,
        {
            "target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 12},
            "alpha_pattern": {"k_proj": 1, "^model.layers.0.mlp.up_proj": 64},
        },
    ),
    "embedding and saved modules": (_llama, {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "biases": (_llama, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "turned": (_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "turned, and a head that is not": (_gpt2, {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "turned, and no flag": (_gpt2, {"target_modules": ["c_attn"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merge_and_unload(case: str, tmp_path: Path) -> None:
    """Every weight is what peft makes of it; those that the adapter leaves are the checkpoint's own."""
    make, options = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "model")
    if case == "biases":  # the layers have none: peft adds them to what it makes, a checkpoint has nowhere to put them
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "down_proj")):
                module.bias = torch.nn.Parameter(torch.randn(module.out_features))
        model.save_pretrained(tmp_path / "model")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 8, "lora_alpha": 16} | options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    before = {name: tensor.numpy().copy() for name, tensor in make().state_dict().items()}
    expected = {name: tensor.numpy() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    with qc.load(tmp_path / "model", "f16", include=[], other="keep", lora=[tmp_path / "adapter"], mode="off") as loaded:
        tied = set(expected) - set(loaded)
        assert tied <= {"lm_head.weight"}
        changed = 0
        for name, weight in loaded.items():
            theirs = expected[name if name in expected else f"transformer.{name}"]
            np.testing.assert_allclose(weight, theirs, **CLOSE, err_msg=name)
            changed += name in before and not np.allclose(before[name], weight, atol=1e-3)
        assert changed >= {"embedding and saved modules": 5, "biases": 4}.get(case, 2)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_is_no_lora(options: dict[str, Any], tmp_path: Path) -> None:
    """DoRA is refused by its name; so is PiSSA, which changes the checkpoint's own weights before it adds to them."""
    model = _llama()
    model.save_pretrained(tmp_path / "model")
    peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj"], **options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(qc.SourceError, match=r"DoRA|pissa"):
        qc.load(tmp_path / "model", lora=[tmp_path / "adapter"])
