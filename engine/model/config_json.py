"""config.json ↔ ModelConfig, by the rows of `engine/model/families.py`.

Reading refuses every key that it does not understand, by name: a model that runs with half of its
mathematics still writes fluent nonsense. Writing chooses the first family in whose words the
config can be said and read back unchanged; a shape that none has is model type `lm-workbench`.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig, RopeScaling
from engine.errors import CheckpointError
from engine.model.families import FAMILIES, HARMLESS, Family
from engine.values import convert, nearest

OWN_TYPE = "lm-workbench"
QUANTIZATION = "quantization_config"  # only ours, of `engine/matrices.py`, is understood

# Understood in every family with rotary positions.
ROPE_KEYS = {"rope_scaling", "rope_parameters", "original_max_position_embeddings"}
# Understood where a family's row has them; they count layers or switch windows on.
COUNTS = ("max_window_layers", "no_rope_layer_interval", "sliding_window_pattern")
# Our fields whose zero means "derive it" in a recipe, and nothing in a config.json.
SIZES = {"vocab_size", "n_kv_heads", "head_dim", "d_ff", "attention_width"}
# Our fields for which a null in a config.json means what our zero means.
NULLABLE = {"n_kv_heads", "sliding_window", "attention_softcap", "logit_softcap"}
# Their word inside rope_scaling → our field.
SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
BOTH = {"factor", "original_max_position_embeddings"}
SCALING_WORDS = {  # our kind → the words it understands
    "none": BOTH,
    "linear": {"factor"},
    "llama3": BOTH | {"low_freq_factor", "high_freq_factor"},
    "yarn": BOTH
    | {"beta_fast", "beta_slow", "attention_factor"}
    | {"mscale", "mscale_all_dim", "truncate", "finetuned"},
    "longrope": BOTH | {"short_factor", "long_factor", "attention_factor"},
}
SCALING_KINDS = {
    "default": "none",
    "dynamic": "none",  # changes nothing up to max_position_embeddings, where we stop
    "linear": "linear",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}


def from_config_json(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a config.json.

    Raises: CheckpointError, beginning with `where`, if the model type is unknown, a key is not
    understood or missing, or the values make no model.
    """
    try:
        if not isinstance(raw, Mapping):
            raise ValueError("not a JSON object")
        if is_quantized(raw):  # which is another matter than the shape
            raw = {key: value for key, value in raw.items() if key != QUANTIZATION}
        name = raw.get("model_type")
        if name == OWN_TYPE:
            return _build({k: v for k, v in raw.items() if k not in HARMLESS})
        if name not in FAMILIES:
            raise ValueError(
                f"model type {name!r} is not supported; known are {', '.join(sorted(FAMILIES))}"
            )
        return _read(dict(raw), FAMILIES[name])
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where}: {what:.400}") from None  # values may be of any length


def is_quantized(raw: Any) -> bool:
    """Tell whether a config.json is of a checkpoint that we quantized."""
    scheme = raw.get(QUANTIZATION) if isinstance(raw, Mapping) else None
    return isinstance(scheme, Mapping) and scheme.get("quant_method") == OWN_TYPE


def _read(raw: dict[str, Any], family: Family) -> ModelConfig:
    """Interpret a family's config. Raises: ValueError or KeyError for what is not understood."""
    _complete(raw, family)
    values = dict(family.shape)
    for key, ours in family.keys.items():
        value, names = raw[key], (ours,) if isinstance(ours, str) else ours
        if (value is None and names[0] not in NULLABLE) or (value == 0 and names[0] in SIZES):
            raise ValueError(f"{key}={value!r} is not supported")
        values |= dict.fromkeys(names, value) if value is not None else {}
    # Ranges first: what follows counts up to some of these numbers.
    values = _checked(values, {field.name: field for field in dataclasses.fields(ModelConfig)})
    for key in COUNTS:
        if raw.get(key) is not None and (type(raw[key]) is not int or raw[key] < 0):
            raise ValueError(f"{key}={raw[key]!r} must be a whole number, at least 0")
    if not isinstance(raw.get("use_sliding_window", True), (bool, type(None))):
        raise ValueError(f"use_sliding_window={raw['use_sliding_window']!r} must be true or false")
    if "no_rope_layer_interval" in family.defaults:
        values["no_rope_every"] = _read_no_rope(raw)
    if values.get("sliding_window"):
        values |= _read_windows(raw, family)
    if values["position"] == "rope":
        values |= _read_rope(raw, values, family)
    return _build(values)


def _complete(raw: dict[str, Any], family: Family) -> None:
    """Fill in what missing keys mean; refuse unknown keys and values that are not supported."""
    if "_sliding_window_pattern" in raw:
        raw.setdefault("sliding_window_pattern", raw["_sliding_window_pattern"])
    known = {*family.keys, *family.defaults, *family.fixed, *HARMLESS}
    known |= (ROPE_KEYS if "rope_theta" in family.defaults else set()) | (
        {"layer_types"} if family.typed else set()
    )
    for key in raw:
        if key not in known and not key.startswith("_"):
            raise ValueError(f"key {key!r} is not understood for this model type")
    for key, default in family.defaults.items():
        if not callable(default):
            raw.setdefault(key, default)
        elif raw.get(key) is None:
            raw[key] = default(raw)
    for key, allowed in family.fixed.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"{key}={raw[key]!r} is not supported; only {allowed[0]!r} is")


def _build(values: Mapping[str, Any]) -> ModelConfig:
    """Make a config from plain values, each checked as a recipe's would be."""
    values = dict(values)
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    scaling_fields = {field.name: field for field in dataclasses.fields(RopeScaling)}
    scaling = values.pop("rope_scaling", {})
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling={scaling!r} is not a JSON object")
    scaling = RopeScaling(**_checked(scaling, scaling_fields))
    return ModelConfig(**_checked(values, fields), rope_scaling=scaling)


def _checked(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values by their fields' types and ranges. Raises: ValueError naming the key."""
    checked = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"key {key!r} is not understood{nearest(key, fields)}")
        try:
            checked[key] = convert(value, fields[key])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{key}={value!r} {error}") from None
    return checked


def _read_rope(raw: Mapping[str, Any], values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Read rotary positions: base, part of the head, context extension.

    Newer configs keep all of it in rope_parameters, for Gemma 3 once per kind of layer; older ones
    have rope_theta and rope_scaling, which wins where a person added it to a newer file.
    """
    parameters = dict(raw.get("rope_parameters") or {})
    local, both = raw.get("rope_local_base_freq"), "rope_local_base_freq" in family.defaults
    if both and set(parameters) & {"full_attention", "sliding_attention"}:
        inner = {"rope_theta": local} | dict(parameters.pop("sliding_attention", None) or {})
        local = inner.pop("rope_theta")
        if inner.pop("rope_type", "default") != "default" or inner:
            raise ValueError("rope_parameters.sliding_attention: only rope_type 'default' is known")
        outer, parameters = parameters, dict(parameters.pop("full_attention", None) or {})
        if outer:
            raise ValueError(f"rope_parameters key {min(outer)!r} is not understood")
    scaling = parameters | dict(raw.get("rope_scaling") or {})
    newer, older = scaling.pop("rope_type", None), scaling.pop("type", None)
    kind = newer or older or "default"
    if kind not in SCALING_KINDS or (older or kind) not in SCALING_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; known: {', '.join(SCALING_KINDS)}")
    theta = scaling.pop("rope_theta", raw["rope_theta"])
    part = raw.get("partial_rotary_factor", 1.0)
    if "partial_rotary_factor" in family.defaults:
        part = scaling.pop("partial_rotary_factor", part)
    head_dim = values.get("head_dim") or values["d_model"] // max(1, values["n_heads"])
    if (rotary_dim := int(head_dim * part)) < 2:
        raise ValueError(f"partial_rotary_factor={part!r} leaves nothing of a head to rotate")
    read = {"rope_theta": theta, "rotary_dim": rotary_dim}
    if both:
        if local is None or not local >= 1:
            raise ValueError(f"rope_local_base_freq={local!r} must be at least 1")
        read["local_rope_theta"] = local
    ours = SCALING_KINDS[kind]
    return read | {"rope_scaling": _read_scaling(ours, scaling, raw, values["max_seq_len"])}


def _read_scaling(
    kind: str, scaling: dict[str, Any], raw: Mapping[str, Any], longest: int
) -> dict[str, Any]:
    """Read what stretches the frequencies, with the factors that families leave to be derived."""
    for key in scaling:
        if key not in SCALING_WORDS[kind]:
            raise ValueError(f"rope key {key!r} is not understood for this rope type")
    if kind == "none":
        return {}
    if kind != "linear":
        inner = scaling.get("original_max_position_embeddings") or longest
        outer = raw.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = outer or inner
    if kind in ("yarn", "longrope"):
        _derive(scaling, longest)
    elif lacking := [key for key in SCALING_WORDS[kind] if scaling.get(key) is None]:
        raise ValueError(f"rope key {min(lacking)} is missing")
    ours = {SCALING[key]: value for key, value in scaling.items() if value is not None}
    return {"kind": kind} | ours


def _derive(scaling: dict[str, Any], longest: int) -> None:
    """Work out what YaRN and LongRoPE may leave unsaid."""
    if scaling.pop("truncate", True) is not True:
        raise ValueError("rope truncate=false is not supported")
    scaling.pop("finetuned", None)
    if scaling.get("factor") is None:
        scaling["factor"] = longest / scaling["original_max_position_embeddings"]
    if "long_factor" in scaling:  # LongRoPE's factor only sharpens attention, never below one
        scaling["factor"] = max(1.0, scaling["factor"])
    scale, scale_all = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if scale and scale_all and scaling.get("attention_factor") is None:  # DeepSeek's form of YaRN
        grown = math.log(scaling["factor"])
        scaling["attention_factor"] = (0.1 * scale * grown + 1) / (0.1 * scale_all * grown + 1)


def _read_no_rope(raw: dict[str, Any]) -> int:
    """Read which layers know no positions: an interval, or a list with 0 for each such layer."""
    every, layers = raw["no_rope_layer_interval"], raw["num_hidden_layers"]
    if raw["no_rope_layers"] is None:
        raw["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(layers)]
    rotates = [bool((0, 1).index(flag)) for flag in raw["no_rope_layers"]]
    every = rotates.index(False) + 1 if False in rotates else 0
    if rotates != [not every or (i + 1) % every != 0 for i in range(layers)]:
        raise ValueError("no_rope_layers is not every n-th layer, the only pattern supported")
    return every


def _read_windows(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Read which layers look through the window, as our two numbers that describe a pattern."""
    if family.windows is None or not raw.get("use_sliding_window", True):
        return {"sliding_window": 0}
    types = raw.get("layer_types")
    if family.typed and types:
        if set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types {sorted(set(types))} are not all supported")
        if len(types) != raw["num_hidden_layers"]:
            raise ValueError(f"{len(types)} layer_types for {raw['num_hidden_layers']} layers")
        windowed = [kind == "sliding_attention" for kind in types]
    else:
        windowed = list(family.windows(raw))
    if True not in windowed:
        return {"sliding_window": 0}
    first, L = windowed.index(True), len(windowed)
    rest = windowed[first:]
    every = first + rest.index(False) + 1 if False in rest else 0
    # The first full layer after windowed ones may be the second or third multiple of the interval.
    for n in range(2, every + 1) if every else (0,):
        for start in (0, first):
            if windowed == [i >= start and not (n and (i + 1) % n == 0) for i in range(L)]:
                return {"full_every": n, "window_from": start}
    raise ValueError("layer_types do not follow a pattern of every n-th layer")


@functools.lru_cache(maxsize=64)
def family_of(config: ModelConfig) -> str:
    """Name the first published family whose words say this config exactly, or `OWN_TYPE`."""
    for name, family in FAMILIES.items():
        # transformers insists on heads that divide the width for these, and not for Qwen 3.
        if name in ("llama", "gemma2", "gemma3_text", "gpt2") and config.d_model % config.n_heads:
            continue
        try:
            if _read(_write(config, name), family) == config:
                return name
        except (ValueError, KeyError):
            continue
    return OWN_TYPE


def to_config_json(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Describe a config in the words of its family, the weights being stored as `dtype`."""
    return _write(config, family_of(config)) | {"dtype": dtype}


def _write(config: ModelConfig, name: str) -> dict[str, Any]:
    if name == OWN_TYPE:
        return {"model_type": OWN_TYPE} | dataclasses.asdict(config)
    family = FAMILIES[name]
    written: dict[str, Any] = {"architectures": [family.model_class], "model_type": name}
    for key, value in family.fixed.items():
        written[key] = value[0] if isinstance(value, tuple) else value
    for key, ours in family.keys.items():
        value = getattr(config, ours if isinstance(ours, str) else ours[0])
        written[key] = value if value or "softcap" not in key else None
    if config.position == "rope":
        written |= _write_rope(config, family)
    if family.windows is not None:
        written |= _write_windows(config, family)
    return written


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Say rotary positions in both the older and the newer words; readers know one or the other."""
    kind = {"none": "default"}.get(config.rope_scaling.kind, config.rope_scaling.kind)
    scaling: dict[str, Any] = {"rope_type": kind}
    plain = RopeScaling()
    for theirs, ours in SCALING.items():
        value = getattr(config.rope_scaling, ours)
        if value != getattr(plain, ours) or (kind == "llama3" and "freq" in theirs):
            scaling[theirs] = list(value) if isinstance(value, tuple) else value
    if kind in ("linear", "yarn", "llama3"):
        scaling["factor"] = config.rope_scaling.factor
    parameters = scaling | {"rope_theta": config.rope_theta}
    written: dict[str, Any] = {"rope_theta": config.rope_theta}
    if kind != "default":
        written["rope_scaling"] = scaling
    if "partial_rotary_factor" in family.defaults:
        part = config.rotary_dim / config.head_dim
        written["partial_rotary_factor"] = parameters["partial_rotary_factor"] = part
        if kind == "longrope":
            old = config.rope_scaling.original_max_seq_len
            written["original_max_position_embeddings"] = old
    if "rope_local_base_freq" in family.defaults:
        local = config.local_rope_theta or config.rope_theta
        written["rope_local_base_freq"] = local
        parameters = {
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return written | {"rope_parameters": parameters}


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Say which layers look through the window."""
    windows = [config.window(layer) for layer in range(config.n_layers)]
    written: dict[str, Any] = {"sliding_window": config.sliding_window or None}
    if family.typed:
        names = {True: "sliding_attention", False: "full_attention"}
        written["layer_types"] = [names[window > 0] for window in windows]
    if "use_sliding_window" in family.defaults:
        written["use_sliding_window"] = bool(config.sliding_window)
    if "no_rope_layers" in family.defaults:
        written["no_rope_layers"] = [int(config.rotates(i)) for i in range(config.n_layers)]
    return written


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies on disk: its name, which of ours it holds in order, how it lies."""

    name: str
    parts: tuple[str, ...]
    transposed: bool


def stored_tensors(ours: Collection[str], config: ModelConfig, model_type: str) -> Iterator[Stored]:
    """List the tensors that a family stores for a model whose parameters are named `ours`."""
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if model_type == OWN_TYPE:
        yield from (Stored(name, (name,), False) for name in ours if name not in tied)
        return
    family = FAMILIES[model_type]
    for theirs, stems in family.tensors.items():
        stems = (stems,) if isinstance(stems, str) else stems
        for i in range(config.n_layers) if "{i}" in theirs else (0,):
            for kind in ("weight", "bias"):
                parts = tuple(f"{stem.format(i=i)}.{kind}" for stem in stems)
                if set(parts) <= set(ours) - tied:
                    transposed = kind == "weight" and theirs.endswith(family.transposed or ("\0",))
                    yield Stored(f"{theirs.format(i=i)}.{kind}", parts, transposed)
