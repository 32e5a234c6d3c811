"""Run RWKV-7 in plain NumPy over a cached checkpoint, and print how far each codec moves the logits.

    python examples/rwkv7.py MODEL --quant f16,int8,nf4 [--expected LOGITS.bin] [--device gpu]

Source: Peng et al. 2025, arXiv:2503.14456; the tensors' names are those of the original checkpoints.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np

import quantcache as qc


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def normalize(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5, heads: int = 1) -> np.ndarray:
    """Normalize every token, per group of heads."""
    groups = x.reshape(len(x), heads, -1)
    centred = groups - groups.mean(axis=2, keepdims=True)
    return (centred / np.sqrt(groups.var(axis=2, keepdims=True) + eps)).reshape(x.shape) * weight + bias


class OnGpu:
    """A matrix that stays on the GPU: x @ m.T and m @ x are computed there.

    Args:
        tensor: the matrix.
    """

    __array_ufunc__ = None  # so that NumPy leaves x @ m.T to this class

    def __init__(self, tensor: qc.gpu.GpuTensor) -> None:
        self.tensor = tensor

    @property
    def T(self) -> OnGpu:  # noqa: N802 - NumPy's name
        """The same: only x @ m.T is ever asked for."""
        return self

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        """Return x @ m.T."""
        return qc.gpu.matvec(self.tensor, x)

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        """Return m @ x, of a vector."""
        return qc.gpu.matvec(self.tensor, x)


def on_gpu(model: qc.Model, there: qc.gpu.GpuModel) -> dict[str, np.ndarray | OnGpu]:
    """Return the weights: matrices where they are on the GPU, the rest (vectors, and the embedding's table) as arrays."""
    matrices = {n for n, t in there.items() if len(t.shape) == 2 and n.endswith(".weight") and n != "emb.weight"}
    return {n: OnGpu(there[n]) if n in matrices else array(model[n]) for n in model}


def array(tensor: np.ndarray | qc.QuantTensor) -> np.ndarray:
    """Return a tensor's weights."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.dequantize(np.float32)


def forward(weights: Mapping[str, np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Return float32[vocabulary]: the logits after the last token; layer by layer, all tokens at once."""
    w = {n: weight if isinstance(weight, OnGpu) else np.squeeze(weight).astype(np.float32) for n, weight in weights.items()}
    n_heads, head = weights["blocks.0.att.r_k"].shape
    x = normalize(w["emb.weight"][list(tokens)], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
    for layer in range(sum(name.endswith(".ffn.x_k") for name in w)):
        block = {name.removeprefix(f"blocks.{layer}."): w[name] for name in w if name.startswith(f"blocks.{layer}.")}
        att = {name.removeprefix("att."): weight for name, weight in block.items()}
        h = normalize(x, block["ln1.weight"], block["ln1.bias"])
        before = np.vstack([np.zeros_like(h[:1]), h[:-1]]) - h
        xr, xw, xk, xv, xa, xg = (h + before * att[f"x_{part}"] for part in "rwkvag")
        r, k, v = xr @ att["receptance.weight"].T, xk @ att["key.weight"].T, xv @ att["value.weight"].T
        decay = np.exp(-np.exp(np.float32(-0.5)) * sigmoid(att["w0"] + np.tanh(xw @ att["w1"]) @ att["w2"]))
        a, g = sigmoid(att["a0"] + xa @ att["a1"] @ att["a2"]), sigmoid(xg @ att["g1"]) @ att["g2"]
        if layer == 0:
            first = v
        else:
            v = v + (first - v) * sigmoid(att["v0"] + xv @ att["v1"] @ att["v2"])
        kk, k = k * att["k_k"], k * (1 + (a - 1) * att["k_a"])
        r, k, v, kk, a, decay = (part.reshape(-1, n_heads, head) for part in (r, k, v, kk, a, decay))
        kk = kk / np.maximum(np.linalg.norm(kk, axis=2, keepdims=True), np.float32(1e-12))
        state, y = np.zeros((n_heads, head, head), np.float32), np.empty_like(v)
        for t in range(len(h)):  # state[head, value, key]: decay, erase along kk, write v at k, read at r
            erased = (state @ kk[t, :, :, None]) * (kk * a)[t, :, None]
            state = state * decay[t, :, None] - erased + v[t, :, :, None] * k[t, :, None]
            y[t] = (state @ r[t, :, :, None])[:, :, 0]
        bonus = (r * k * att["r_k"].reshape(n_heads, head)).sum(axis=2, keepdims=True) * v
        y = normalize(y.reshape(h.shape), att["ln_x.weight"], att["ln_x.bias"], head * 1e-5, n_heads)
        x = x + ((y + bonus.reshape(h.shape)) * g) @ att["output.weight"].T
        h = normalize(x, block["ln2.weight"], block["ln2.bias"])
        h = h + (np.vstack([np.zeros_like(h[:1]), h[:-1]]) - h) * block["ffn.x_k"]
        x = x + np.maximum(h @ block["ffn.key.weight"].T, 0) ** 2 @ block["ffn.value.weight"].T
    return w["head.weight"] @ normalize(x, w["ln_out.weight"], w["ln_out.bias"])[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="an RWKV-7 checkpoint")
    parser.add_argument("--quant", default="f16,int8,nf4", help="codecs, separated by commas")
    parser.add_argument("--prompt", default='"in', help="its bytes are the tokens")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where matrices are multiplied")
    parser.add_argument("--expected", help="float32 logits to compare with; default: those of the first codec")
    args = parser.parse_args(argv)
    wanted = np.fromfile(args.expected, np.float32) if args.expected else None
    for quant in args.quant.split(","):
        with qc.load(args.model, quant=quant) as model:
            if args.device == "gpu":
                with model.upload() as there:
                    logits = forward(on_gpu(model, there), args.prompt.encode())
            else:
                logits = forward({n: array(tensor) for n, tensor in model.items()}, args.prompt.encode())
            wanted = logits if wanted is None else wanted
            print(f"{quant:8} {'hit ' if model.hit else 'miss'} max difference {np.abs(logits - wanted).max():.3g}")


if __name__ == "__main__":
    main()
