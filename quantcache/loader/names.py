"""Own how the tensors of RWKV GGUF files are called in RWKV's own checkpoints, and the way back. Mappings are data.

A fused tensor becomes one for each of its slices, all views of the same bytes; a vector gets the axes of length 1 that
checkpoints give it. Names of other architectures stay as the file has them: so their runtimes expect them.
Source: llama.cpp's converter (architectures rwkv6, rwkv7) and rwkv.cpp's (rwkv).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantcache.tensor import TensorInfo

__all__ = ["SCHEMES", "Alias", "from_gguf", "runtime_names", "to_gguf", "turned_by_gguf"]


@dataclass(frozen=True, slots=True)
class Alias:
    """Pair one name of a GGUF file with those of the checkpoint.

    Args:
        gguf: name in the file; {} stands for the block's number.
        names: names in the checkpoint; more than one for the slices of a fused tensor, in order.
        shape: of each, as in reshape, with "head" for the head size; None keeps the file's.
        transposed: the file has the last two axes the other way round.
    """

    gguf: str
    names: tuple[str, ...]
    shape: tuple[int | str, ...] | None = None
    transposed: bool = False


_VECTOR = (1, 1, -1)


def _same(prefix: str, block: str, *pairs: tuple[str, str]) -> Iterator[Alias]:
    """Pair names that differ in nothing but their spelling."""
    for theirs, ours in pairs:
        yield Alias(f"{prefix}{theirs}", (f"{block}{ours}",))


_BLOCK, _CHECKPOINT = "blk.{}.", "blocks.{}."

_OUTSIDE = tuple(
    _same("", "",
          ("token_embd.weight", "emb.weight"), ("token_embd_norm.weight", "blocks.0.ln0.weight"),
          ("token_embd_norm.bias", "blocks.0.ln0.bias"), ("output_norm.weight", "ln_out.weight"),
          ("output_norm.bias", "ln_out.bias"), ("output.weight", "head.weight"))
)  # fmt: skip

_MATRICES = tuple(
    _same(_BLOCK, _CHECKPOINT,
          ("attn_norm.weight", "ln1.weight"), ("attn_norm.bias", "ln1.bias"),
          ("attn_norm_2.weight", "ln2.weight"), ("attn_norm_2.bias", "ln2.bias"),
          ("time_mix_receptance.weight", "att.receptance.weight"), ("time_mix_key.weight", "att.key.weight"),
          ("time_mix_value.weight", "att.value.weight"), ("time_mix_output.weight", "att.output.weight"),
          ("time_mix_ln.weight", "att.ln_x.weight"), ("time_mix_ln.bias", "att.ln_x.bias"),
          ("channel_mix_key.weight", "ffn.key.weight"), ("channel_mix_value.weight", "ffn.value.weight"))
)  # fmt: skip


def _time_mix(theirs: str, ours: str, shape: tuple[int | str, ...] | None = None, *, transposed: bool = False) -> Alias:
    return Alias(f"{_BLOCK}{theirs}.weight", (f"{_CHECKPOINT}{ours}",), shape, transposed)


_RWKV7 = (
    *_OUTSIDE, *_MATRICES,
    *(_time_mix(f"time_mix_{x}", f"att.{x}", _VECTOR) for x in ("w0", "a0", "v0", "k_k", "k_a")),
    *(_time_mix(f"time_mix_{x}", f"att.{x}", transposed=True) for x in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")),
    _time_mix("time_mix_r_k", "att.r_k", (-1, "head")),
    _time_mix("channel_mix_lerp_k", "ffn.x_k", _VECTOR),
    Alias(f"{_BLOCK}time_mix_lerp_fused.weight", tuple(f"{_CHECKPOINT}att.x_{x}" for x in "rwkvag"), _VECTOR),
)  # fmt: skip

_RWKV6 = (
    *_OUTSIDE, *_MATRICES,
    _time_mix("time_mix_gate", "att.gate.weight"),
    _time_mix("time_mix_first", "att.time_faaaa", (-1, "head")),
    _time_mix("time_mix_decay", "att.time_decay", _VECTOR),
    _time_mix("time_mix_lerp_x", "att.time_maa_x", _VECTOR),
    *(_time_mix(f"time_mix_lerp_{x}", f"att.time_maa_{x}", _VECTOR) for x in "wkvrg"),
    *(_time_mix(f"time_mix_{x}", f"att.time_maa_{x}", transposed=True) for x in ("w1", "w2")),
    *(_time_mix(f"time_mix_decay_{x}", f"att.time_decay_{x}", transposed=True) for x in ("w1", "w2")),
    *(_time_mix(f"channel_mix_lerp_{x}", f"ffn.time_maa_{x}", _VECTOR) for x in "kr"),
    _time_mix("channel_mix_receptance", "ffn.receptance.weight"),
    Alias(f"{_BLOCK}time_mix_lerp_fused.weight", tuple(f"{_CHECKPOINT}att.time_maa_{x}" for x in "wkvrg"), _VECTOR),
)  # fmt: skip

#: rwkv.cpp keeps the checkpoint's names; it fuses the six vectors and turns the small matrices round.
_RWKV_CPP = (
    *(Alias(f"{_CHECKPOINT}att.{x}", (f"{_CHECKPOINT}att.{x}",), transposed=True)
      for x in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")),
    Alias(f"{_CHECKPOINT}att.x_rwkvag", tuple(f"{_CHECKPOINT}att.x_{x}" for x in "rwkvag"), _VECTOR),
)  # fmt: skip

#: general.architecture -> its aliases. The number rises with every change: it is in the key.
SCHEMES: Mapping[str, tuple[Alias, ...]] = {"rwkv7": _RWKV7, "rwkv6": _RWKV6, "rwkv": _RWKV_CPP}
VERSION = 1
_MAX_HEAD = 1 << 16
#: A model of 61 layers has 2,000; a slice of a fused one takes 300 bytes.
_MAX_TENSORS = 1 << 14

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _general(name: str) -> tuple[str, str]:
    """Return a name with {} for its block's number, and that number."""
    found = _NUMBER.search(name)
    return (f"{name[: found.start()]}{{}}{name[found.end() :]}", found[0]) if found else (name, "")


def from_gguf(name: str, architecture: str) -> tuple[str, ...]:
    """Return what a GGUF's tensor is called in the checkpoint: several names if it is fused, its own if unknown.

    Args:
        name: in the file.
        architecture: the file's `general.architecture`.
    """
    general, number = _general(name)
    for alias in SCHEMES.get(architecture, ()):
        if general == alias.gguf:
            return tuple(found.format(number) for found in alias.names)
    return (name,)


def to_gguf(name: str, architecture: str) -> str:
    """Return the tensor of a GGUF in which a checkpoint's tensor stands; its own name if there is no other.

    Args:
        name: in the checkpoint.
        architecture: the `general.architecture` that the file has.
    """
    general, number = _general(name)
    for alias in SCHEMES.get(architecture, ()):
        for found in alias.names:
            if found in (general, name):  # blocks.0.ln0 stands outside the blocks in a GGUF
                return alias.gguf.format(number)
    return name


def turned_by_gguf(name: str) -> bool:
    """Return whether a GGUF has a matrix of that name the other way round than the checkpoint."""
    general, _ = _general(name)
    return any(alias.transposed for scheme in SCHEMES.values() for alias in scheme if alias.gguf == general != alias.names[0])


def runtime_names(
    files: Sequence[Mapping[str, TensorInfo]], architecture: Any, metadata: Mapping[str, Any]
) -> list[tuple[dict[str, TensorInfo], str]]:
    """Return the tensors under the checkpoint's names, fused ones as slices, and which scheme did it.

    Args:
        files: the tensors of every file of the checkpoint, as the file has them.
        architecture: the checkpoint's `general.architecture`; an unknown one changes nothing.
        metadata: of the checkpoint, for the head size.

    Returns:
        For every file its tensors and the scheme, "" if nothing changed; it names what it would have changed, too, if
        another file did not have that name already.
    """
    aliases = {alias.gguf: alias for alias in SCHEMES.get(architecture, ())} if isinstance(architecture, str) else {}
    if not aliases or sum(map(len, files)) > _MAX_TENSORS:
        return [(dict(tensors), "") for tensors in files]
    head = metadata.get(f"{architecture}.wkv.head_size", 64)
    head = head if isinstance(head, int) and 0 < head <= _MAX_HEAD else 64
    present = {name for tensors in files for name in tensors}
    taken: set[str] = set()
    found = []
    for tensors in files:
        renamed: dict[str, TensorInfo] = {}
        kept = ""
        for name, info in tensors.items():
            general, number = _general(name)
            alias = aliases.get(general)
            made = list(_slices(info, alias, number, head)) if alias else [info]
            if any(new.name in taken or (new.name in present and new.name != name) for new in made):
                made = [info]  # the checkpoint has that name already: the file's own names are the safer ones
                kept += f" not {name}"
            taken |= {new.name for new in made}
            renamed |= {new.name: new for new in made}
        unchanged = list(renamed.values()) == list(tensors.values())
        found.append((renamed, "" if unchanged else f"{architecture}/{VERSION}/{head}{kept}"))
    return found


def _slices(info: TensorInfo, alias: Alias, number: str, head: int) -> Iterator[TensorInfo]:
    """Yield the tensors that a file's tensor holds; itself if its shape is not the one that the scheme expects."""
    count = len(alias.names)
    if count > 1 and (not info.shape or info.shape[0] != count or info.is_block):
        yield info
        return
    if alias.transposed and len(info.shape) < 2:
        alias = replace(alias, transposed=False)
    shape = info.shape[1:] if count > 1 else info.shape
    size, nbytes = info.size // count, info.nbytes // count
    if alias.shape is not None and not info.is_block:
        wanted = tuple(head if axis == "head" else axis for axis in alias.shape)
        known = 1
        for axis in wanted:
            known *= int(axis) if axis != -1 else 1
        if size % known == 0:
            shape = tuple(size // known if axis == -1 else int(axis) for axis in wanted)
    for position, name in enumerate(alias.names):
        yield replace(
            info, name=name.format(number), shape=shape, offset=info.offset + position * nbytes, nbytes=nbytes,
            transposed=alias.transposed,
        )  # fmt: skip
