"""PEFT's adapter_config.json: checked and read, and made for an adapter."""

import collections
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_kernels.adapters.formats.adapter import Adapter
from lora_kernels.adapters.formats.peft_variants import PLAIN, Variants, parse_variants
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.model.targets import Hyperparameters, LayerSpec
from lora_kernels.model.trainable import BIAS

__all__ = ["AdapterConfig", "make_config", "parse_config"]

# Keys of adapter_config.json that say nothing about what the layers compute.
_INFORMATION = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that leave the base weight as it was; PiSSA, OLoRA, LoftQ and others do not.
# MiCA never trains lora_B.
_MICA = "mica"
_HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal", _MICA)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, with PEFT's names and defaults.

    restricted: exclude_modules or layers_to_transform leave out some of target_modules. keeps_ties:
    ensure_weight_tying. trains_b: whether lora_B trains. version: PEFT's, if the file says it.
    """

    numbers: Hyperparameters
    target_modules: str | list[str]
    target_parameters: list[str]
    bias: str
    modules_to_save: list[str]
    restricted: bool
    fan_in_fan_out: bool
    base_model: str | None
    keeps_ties: bool = False
    trains_b: bool = True
    version: str | None = None
    variants: Variants = PLAIN


def parse_config(raw) -> AdapterConfig:
    """The checked content of adapter_config.json. Raises: ValueError that names the key."""
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    raw = dict(raw)

    def take(key, kinds, default=None):
        value = raw.pop(key, None)
        value = default if value is None else value
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{key}: unexpected value {value!r}")
        return value

    def take_names(key, default=None):
        names = take(key, (str, list), default)
        if isinstance(names, list) and not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{key}: must be a list of names, got {names!r}")
        return names

    if take("peft_type", (str,)) != "LORA":
        raise ValueError("peft_type: only 'LORA' can be loaded")
    initialisation = raw.pop("init_lora_weights", True)
    if isinstance(initialisation, str):
        initialisation = initialisation.lower()
    if initialisation not in _HARMLESS_INIT:
        raise ValueError(
            f"init_lora_weights: only an initialisation that keeps the base weights can be loaded, "
            f"got {initialisation!r}"
        )
    fan_in_fan_out = take("fan_in_fan_out", (bool,), False)
    bias = take("bias", (str,), "none")
    if bias not in BIAS:
        raise ValueError(f"bias: must be 'none', 'all' or 'lora_only', got {bias!r}")
    saved = take_names("modules_to_save", [])
    restricted = [raw.pop(key, None) for key in ("exclude_modules", "layers_to_transform")]
    raw.pop("layers_pattern", None)
    numbers = Hyperparameters(
        r=take("r", (int,), 8),
        lora_alpha=take("lora_alpha", (int, float), 8),
        lora_dropout=check_dropout(take("lora_dropout", (int, float), 0.0), "adapter"),
        rank_pattern=take("rank_pattern", (dict,), {}),
        alpha_pattern=take("alpha_pattern", (dict,), {}),
        use_rslora=take("use_rslora", (bool,), False),
        use_dora=take("use_dora", (bool,), False),
    )
    for rank in (numbers.r, *(numbers.rank_pattern or {}).values()):
        check_rank(rank, "adapter")
    for alpha in (numbers.lora_alpha, *(numbers.alpha_pattern or {}).values()):
        check_alpha(alpha, "adapter")
    parameters = take("target_parameters", (list,), [])
    if not all(isinstance(name, str) and name for name in parameters):
        raise ValueError(f"target_parameters: must be a list of names, got {parameters!r}")
    base_model, version = raw.get("base_model_name_or_path"), raw.get("peft_version")
    config = AdapterConfig(
        numbers=numbers,
        target_modules=take_names("target_modules", [] if parameters else None),
        target_parameters=parameters,
        bias=bias,
        modules_to_save=[saved] if isinstance(saved, str) else saved,
        restricted=any(value not in (None, [], "") for value in restricted),
        fan_in_fan_out=fan_in_fan_out,
        base_model=base_model if isinstance(base_model, str) else None,
        keeps_ties=take("ensure_weight_tying", (bool,), False),
        trains_b=initialisation != _MICA,
        version=version if isinstance(version, str) else None,
        variants=parse_variants(
            take("lora_bias", (bool,), False),
            bool(take("velora_config", (dict, bool), {})),
            take("use_bdlora", (dict, bool), {}) or {},
        ),
    )
    if raw.get("kasa_config"):
        raise ValueError(
            "kasa_config: only an adapter that keeps the base weights can be loaded, and KaSA "
            "truncates them: load it through PEFT, patch_peft() runs it"
        )
    for key, value in raw.items():
        if key not in _INFORMATION and value not in (None, False, "", [], {}):
            raise ValueError(f"{key}: {value!r} is not supported")
    return config


def make_config(adapter: Adapter, ranks: Mapping[str, int], modules_to_save: list[str]) -> dict:
    """The content of adapter_config.json; ranks: the ranks in PEFT's factors, by path."""

    def divisor(rank: int, rslora: bool) -> float:
        return math.sqrt(rank) if rslora else rank

    def scaled(spec: LayerSpec, rslora: bool) -> bool:
        return spec.scaling == spec.lora_alpha / divisor(spec.r, rslora)

    layers = adapter.layers.values()
    use_rslora = all(scaled(layer.spec, True) for layer in layers) and not all(
        scaled(layer.spec, False) for layer in layers
    )
    alphas = {}
    for path, layer in adapter.layers.items():
        spec = layer.spec
        if scaled(spec, use_rslora) and ranks[path] % spec.r == 0:
            alpha = spec.lora_alpha * divisor(ranks[path] // spec.r, use_rslora)
        else:
            alpha = spec.scaling * divisor(ranks[path], use_rslora)
        alphas[path] = int(alpha) if float(alpha).is_integer() else float(alpha)
    # From this PEFT's AutoPeftModel classes know what to make the base model of.
    base = adapter.base_class
    mapping = base and {"base_model_class": base.__name__, "parent_library": base.__module__}
    r, lora_alpha = _most_common(ranks.values()), _most_common(alphas.values())
    dropouts = [layer.spec.lora_dropout for layer in layers if layer.base.kind != "embedding"]
    if adapter.stacks:
        dropouts = [0.0]  # PEFT refuses any other beside target_parameters
    return {
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != lora_alpha},
        "auto_mapping": mapping,
        "base_model_name_or_path": adapter.base_model,
        "bias": adapter.bias,
        "fan_in_fan_out": any(layer.base.fan_in_fan_out for layer in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": _most_common(dropouts or [0.0]),
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {f"^{re.escape(p)}": rank for p, rank in ranks.items() if rank != r},
        "revision": None,
        "target_modules": adapter.target_modules,
        **({"target_parameters": list(adapter.target_parameters)} if adapter.stacks else {}),
        "task_type": None,
        "use_dora": adapter.use_dora,
        "use_rslora": use_rslora,
    }


def _most_common(values: Iterable):
    return collections.Counter(values).most_common(1)[0][0]
