"""Checkpoints of quantised weights: read back into the run's dtype where transformers can do that.

What is captured are then the states of the weights that the checkpoint says, without the
rounding of activations that an engine may add.  What cannot be read is an error that says why.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..errors import ConfigError
from ..text import cut, shorten

OTHER = "target.path= its unquantised checkpoint, or target.engine=sglang"
# what transformers needs besides itself, by quant_method
PACKAGES = {
    "auto-round": "auto-round",
    "awq": "gptqmodel accelerate",
    "bitsandbytes": "bitsandbytes accelerate",
    "compressed-tensors": "compressed-tensors accelerate",
    "fbgemm_fp8": "kernels accelerate",
    "fp8": "accelerate",
    "gptq": "gptqmodel optimum accelerate",
    "hqq": "hqq accelerate",
    "mxfp4": "accelerate",
    "quanto": "optimum-quanto accelerate",
    "quark": "amd-quark",
    "torchao": "torchao accelerate",
}
# the ways whose weights are read back into plain ones
PLAIN = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}


def quant_method(config: Any) -> str | None:
    """Return how a config says its weights are quantised, if they are; "" where it does not say."""
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            found = found if isinstance(found, dict) else found.to_dict()
            if found.get("load_in_4bit") or found.get("load_in_8bit"):
                return "bitsandbytes"
            return str(getattr(found.get("quant_method"), "value", found.get("quant_method") or ""))
    return None


def check_method(method: str, path: str) -> None:
    """Raise ConfigError for a way that transformers does not know: it would pass over it."""
    known = {name.removesuffix("_4bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if method not in known:
        named = f"quant_method {shorten(method)}" if method else "no quant_method"
        raise ConfigError(
            f"target.path {path!r} is quantised, with {named} in the quantization_config of its "
            f"config.json, which transformers {transformers.__version__} does not read. "
            f"Try: {OTHER}"
        )


def as_plain(method: str | None) -> dict[str, Any]:
    """Return what `from_pretrained` is told so that weights become plain ones, where it can be."""
    if method not in PLAIN:
        return {}
    assert method is not None
    make = getattr(transformers, PLAIN[method])
    known = inspect.signature(make).parameters
    way = {"dequantize": True} if "dequantize" in known else {"run_compressed": False}
    return {"quantization_config": make(**way)}


def widen_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring weights that were read back to a narrower dtype than the run's into it.

    transformers 5.17 reads MXFP4 back to bfloat16, whatever is asked for.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def loading(method: str | None, path: str) -> Iterator[None]:
    """Turn what goes wrong while a quantised target is loaded and first run into one ConfigError.

    A `method` of None is no quantised target, and changes nothing.
    """
    if method is None:
        yield
        return
    with warnings.catch_warnings():
        # that its own quantization_config is kept, beside what `as_plain` asks for
        warnings.filterwarnings("ignore", ".*already has a `quantization_config`")
        try:
            yield
        except (ConfigError, RuntimeError, NotImplementedError, TypeError, ImportError) as exc:
            cause = exc.__cause__ or exc
            reason = cut(" ".join(str(cause).split()), 300).rstrip(". ")
            packages = PACKAGES.get(method) if isinstance(cause, ImportError) else None
            first = f"pip install {packages}, or " if packages else ""
            raise ConfigError(
                f"target.path {path!r} is quantised ({method}), and cannot be run here: {reason}. "
                f"Try: {first}{OTHER}"
            ) from exc
