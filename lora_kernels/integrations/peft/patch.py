"""patch_peft() and unpatch_peft(): forwards of PEFT's LoRA layers replaced, and given back.

The patch replaces one method of a few classes and stores nothing on modules. A call that the guard
does not know runs PEFT's own forward.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.foreign import ForeignModule, importing
from lora_kernels.functional.dora import dora_forward
from lora_kernels.integrations.peft import dora, experts, mixed, quantized, variants
from lora_kernels.integrations.peft.census import Census
from lora_kernels.integrations.peft.guard import BASES, NotFused, misfit, operands_of
from lora_kernels.integrations.peft.source import digest
from lora_kernels.layers import mixture
from lora_kernels.quantization import FrozenWeight
from lora_kernels.spec import DoraSpec, LoraSpec, OutputSplits

__all__ = ["patch_peft", "patched_experts", "unpatch_peft", "unreached"]

# sha256 of the source of lora.Linear.forward in the versions of PEFT that the guard is written for.
_KNOWN_FORWARDS = {
    "b80200c828a5ba02b15e307c599bfe69c60152eb8d543d964af5cea5b024ec3c",  # 0.16.0 to 0.17.1
    "ec0a80f5c5ce05f5dd90027952bb5d29aaf910e9d2ab40486a90e8a03c7e1cd9",  # 0.18.0 to 0.21.2
}


def _why_not(layer: nn.Module) -> str | None:
    """Why PEFT's own code runs a layer that reached a patched forward; None if it does not."""
    if hasattr(layer, "parameter_name"):
        experts_found = patched_experts(layer)
        return experts_found.reason if isinstance(experts_found, NotFused) else None
    if not isinstance(operands_of(layer), NotFused):
        return None
    found = variants.folded_of(layer)
    return found.reason if isinstance(found, NotFused) else None


_census = Census(_why_not)  # of the first training step since the patch
_upstream: dict[type[ForeignModule], Callable] = {}  # PEFT's forwards, while patched
_endings: list[Callable[[], None]] = []  # what unpatch_peft() calls, too


def patch_peft() -> None:
    """Has PEFT's LoRA layers run lora_linear, and its LoRA over experts lora_grouped_linear.

    Replaces the forwards of ``lora.Linear``, over nn.Linear and Hugging Face's Conv1D, and of
    ``lora.ParamWrapper`` (target_parameters), over experts of Transformers, in
    ``peft.tuners.lora.layer``, for models that exist and models to come. So it does for LoRA over
    quantised layers of bitsandbytes, torchao, HQQ and others: the forward of the base stays its
    own, the update is added to it, and the backward makes the dense weight for one product.
    DoRA (``use_dora``) is taken too, with PEFT's dropout, unless the base rounds x to 8 bits.
    Samples with adapters of their own (``adapter_names``) take one call for all adapters.
    lora_bias, MiCA, KaSA and BD-LoRA are the same operation over other operands, and so are several
    active adapters if no dropout acts.
    If a call is none of these, PEFT's own forward runs; ``report(model)`` says which and why.
    Without dropout the results are PEFT's within rounding. With dropout the masks are others.
    Call it before a model is compiled. A second call changes nothing.
    One line on stderr says after the first training step how many layers train on this package, and
    why others do not, unless LORA_KERNELS_QUIET=1 or the model is compiled.

    Warns: RuntimeWarning, once, if the forward of lora.Linear of this version of PEFT is not a
    known one. Over experts and quantised layers an unknown version runs PEFT's own forward.
    Raises: ImportError if peft is not installed.
    """
    with importing("peft", "patch_peft"):
        from peft.tuners.lora import layer as peft

    global _census
    if _upstream:
        return
    _census = Census(_why_not)
    _warn_unless_known(peft.Linear.forward)
    BASES.setdefault(peft.Conv1D, peft.Conv1D.forward)
    dora.register()
    variants.register()
    replacements: dict[type[ForeignModule], Callable] = {peft.Linear: _patched}
    if hasattr(peft, "ParamWrapper"):  # since 0.17
        replacements[peft.ParamWrapper] = _patched_experts
    for kind, patched in replacements.items():
        _upstream[kind], kind.forward = kind.forward, patched(kind.forward)
    for kind in quantized.classes_below(peft.LoraLayer):
        _patch_quantised(kind)
    _endings.append(quantized.watch_classes(peft.LoraLayer, _patch_quantised))


def unpatch_peft() -> None:
    """Gives PEFT its own forwards back; without a patch it changes nothing.

    Raises: RuntimeError if something else has replaced a forward since patch_peft().
    """
    for kind, upstream in _upstream.items():
        if getattr(kind.forward, "__wrapped__", None) is not upstream:
            raise RuntimeError(
                f"unpatch_peft: lora.{kind.__name__}.forward has been replaced since patch_peft(); "
                f"undo that first, it is now {kind.forward!r}"
            )
    while _upstream:
        kind, kind_forward = _upstream.popitem()
        kind.forward = kind_forward
    while _endings:
        _endings.pop()()
    _census.forget()


def unreached(layer: nn.Module) -> NotFused | None:
    """Why a call of this PEFT LoRA layer does not reach a patched forward; None if it does.

    If it does, the guard decides about the call.
    """
    if not _upstream:
        return NotFused("patch_peft() has not been called")
    kind = next((kind for kind in _upstream if type(layer).forward is kind.forward), None)
    if kind is None:
        name = type(layer).__name__
        if quantized.is_quantised(type(layer)):
            return NotFused(f"{name}.forward of this PEFT is not that of a known version")
        return NotFused(f"{name} of PEFT has a forward of its own")
    if "forward" in layer.__dict__:
        # A hook of Accelerate keeps the method that it replaces.
        replaced = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
        if replaced is not kind.forward:
            return NotFused("it has a forward of its own, such as a hook from before patch_peft()")
    return None


@functools.cache
def _warn_unless_known(forward: Callable) -> None:
    if digest(forward) not in _KNOWN_FORWARDS:
        warnings.warn(
            "patch_peft: lora_kernels does not know the lora.Linear.forward of this PEFT (it knows "
            "those of 0.16.0 to 0.21.2). It is patched all the same: compare results with and "
            "without the patch",
            RuntimeWarning,
            stacklevel=3,
        )


def _patch_quantised(kind: type[ForeignModule]) -> None:
    forward = kind.forward
    if kind not in _upstream and quantized.is_known(kind, forward):
        _upstream[kind], kind.forward = forward, _patched(forward)


def _patched(upstream: Callable) -> Callable:
    @functools.wraps(upstream)
    def forward(self, x, *args, **kwargs):
        y = compute(self, x, *args, **kwargs)
        if not torch.compiler.is_compiling() and _census.is_open:
            _census.note(self, y)
        return y

    def compute(self, x, *args, **kwargs):
        if args or kwargs or torch.jit.is_tracing():
            if kwargs.keys() == {"adapter_names"} and not args and not torch.jit.is_tracing():
                found = mixed.mixed_of(self, x, kwargs["adapter_names"])
                if not isinstance(found, NotFused):
                    return mixed.compute_mixed(x, *found)
            return upstream(self, x, *args, **kwargs)
        operands = operands_of(self)
        if isinstance(operands, NotFused):
            folded = variants.folded_of(self)
            if isinstance(folded, NotFused) or misfit(x, folded.operands) is not None:
                return upstream(self, x)
            return variants.compute_folded(x, folded)
        if misfit(x, operands) is not None:
            return upstream(self, x)
        weight, a, b, bias, scaling, dropout_p, magnitude = operands
        if isinstance(scaling, Tensor):
            b, scaling = b * scaling, 1.0  # its value stays on the device
        splits = OutputSplits.whole(weight.shape[0])
        if magnitude is not None:
            dora_spec = DoraSpec(scaling, dropout_p, splits)
            return dora_forward(self, x, weight, a, b, bias, magnitude, dora_spec)
        spec = LoraSpec(scaling, dropout_p, splits)
        if isinstance(weight, FrozenWeight):
            return functional.quantized_forward(self, x, weight, a, b, spec)
        return functional.lora_forward(self, x, weight, a, b, bias, spec)

    return forward


def _patched_experts(upstream: Callable) -> Callable:
    from peft.tuners.lora.layer import ParamWrapper

    versions = experts.versions(ParamWrapper, upstream)

    @functools.wraps(upstream)
    def forward(self, x, *args, **kwargs):
        if torch.jit.is_tracing():
            return upstream(self, x, *args, **kwargs)
        found = experts.experts_of(self, versions)
        if isinstance(found, NotFused) or experts.misfit_of_experts(x, found, args, kwargs):
            y = upstream(self, x, *args, **kwargs)
        else:
            y = mixture.compute(found.module, found.updates, x, *args)
        if not torch.compiler.is_compiling() and _census.is_open:
            _census.note(self, y)
        return y

    vars(forward)["versions"] = versions
    return forward


def patched_experts(layer: ForeignModule) -> experts.Experts | NotFused:
    """The experts that this outermost ParamWrapper computes under the patch, or why it does not."""
    return unreached(layer) or experts.experts_of(layer, type(layer).forward.versions)
