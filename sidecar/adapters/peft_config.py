"""Parse adapter_config.json: use the fields that change an adapter's effect, and refuse those that rows cannot carry.

Each known field is either without effect on the meaning of the saved weights, or used, or refused when it is set. An
unknown field is refused too unless it is empty: it may change the weights' meaning, and an adapter that is served
slightly wrong is worse than one that is not served.

Detect tensors that contradict the modules and layers that a PEFT config targets.

PEFT loads the tensors that its config targets and ignores the rest; engines load every tensor. Where the two differ,
the intent is unknown. A regular expression in target_modules or exclude_modules is not evaluated: it is untrusted, can
take exponential time, and matches the whole name, which newer libraries have changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.adapters.names import is_base_name, shown
from sidecar.adapters.refusal import malformed, unsupported
from sidecar.adapters.strict_json import parse_object

_WORDS_MAX = 16_384
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targeting:
    """Endings of module names that are targeted or excluded, and targeted layers; None where the config has none."""

    included: frozenset[str] | None = None
    excluded: frozenset[str] | None = None
    layers: frozenset[int] | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Targeting:
        """Read the targeting from the config's fields. Raises ValueError with the field's name."""
        return cls(_names(fields, "target_modules"), _names(fields, "exclude_modules"), _layers(fields))

    def contradiction(self, path: str, layer: int, is_expert: bool) -> str | None:
        """Return the name of the field that leaves a module out, or None."""
        if self.included is not None and not _is_among(path, self.included):
            return "target_modules"
        if self.excluded is not None and _is_among(path, self.excluded):
            return "exclude_modules"
        # Without a layers_pattern PEFT takes the last number in a name, which in a mixture is the expert's.
        if self.layers is not None and not is_expert and layer not in self.layers:
            return "layers_to_transform"
        return None


def _is_among(path: str, names: frozenset[str]) -> bool:
    """Return True if the path is one of the names, or ends in one."""
    parts = path.split(".")
    return any(".".join(parts[first:]) in names for first in range(len(parts)))


def _names(fields: Mapping[str, Any], name: str) -> frozenset[str] | None:
    value = fields.get(name)
    if value is None or isinstance(value, str) or value == []:
        return None
    if not isinstance(value, list) or len(value) > _WORDS_MAX or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{name} is {shown(repr(value)[:200])}; it is a list of names or one regular expression")
    return None if _ALL_LINEAR in value else frozenset(value)


def _layers(fields: Mapping[str, Any]) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    numbers = [value] if type(value) is int else value
    if numbers is None or numbers == []:
        return None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"layers_to_transform is {shown(repr(value)[:200])}; it is a number or a list of numbers")
    return frozenset(numbers)


FILE_NAME = "adapter_config.json"
CONFIG_BYTES_MAX = 1 << 20

_CHANGES_NOTHING = frozenset(
    {
        "auto_mapping", "base_model_class", "corda_config", "ensure_weight_tying", "eva_config",
        "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
    }
)  # fmt: skip
"""Fields about how or where the adapter was trained: the saved A and B are the result already. fan_in_fan_out
transposes the base model's weight, not A and B."""

_USED = frozenset(
    {
        "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights",
        "layers_pattern", "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern",
        "target_modules", "use_rslora",
    }
)  # fmt: skip

_REFUSED_WHEN_SET = {
    "use_dora": "DoRA needs the base model's weights to be applied; merge the adapter or train with use_dora=false",
    "modules_to_save": "fully trained modules cannot be carried by packed LoRA rows; train without modules_to_save",
    "lora_bias": "a bias cannot be carried by packed LoRA rows; train with lora_bias=false",
    "layer_replication": "a model with replicated layers is not the engine's model; train without layer_replication",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts on a part of the prompt only, which engines cannot do; "
    "train a plain LoRA",
    "use_qalora": "QA-LoRA pools its input, which engines cannot do; train with use_qalora=false",
    "use_bdlora": "block-diagonal LoRA is not supported; train with use_bdlora=false",
    "megatron_config": "Megatron's parallel layers are not supported; save the adapter for plain Linear layers",
    "target_parameters": "LoRA on bare parameters (experts) is not supported; use target_modules",
    "trainable_token_indices": "trained token embeddings cannot be carried by packed LoRA rows; train without",
    "kasa_config": "KaSA changes the base model's weights; merge the adapter or train a plain LoRA",
    "monteclora_config": "MonteCLoRA adds samples to A and B, which engines cannot do; train a plain LoRA",
    "arrow_config": "a router of adapters (Arrow) is not supported; serve its experts by name",
}

_OTHER_METHODS = {
    "ADALORA": "AdaLoRA keeps singular values beside A and B; save it as a plain LoRA of its final ranks",
    "VERA": "VeRA scales random matrices that all layers share; train a LoRA",
    "IA3": "IA3 scales activations, which packed LoRA rows cannot carry; merge it into the base model",
    "PROMPT_TUNING": "prompt tuning adds tokens to the prompt and no weights; send them as a prompt embedding table",
    "P_TUNING": "p-tuning adds tokens to the prompt and no weights; send them as a prompt embedding table",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the cache, which engines cannot do; train a LoRA",
}

_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that choose where training starts and do not change the base model."""

_RESIDUAL_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that subtract the start from the base model's weights: the saved A and B are not the difference to
the original model."""
ENTRIES_MAX = 4096
KEY_LENGTH_MAX = 256
_COST_MAX = 64**3
_TOTAL_COST_MAX = 4 * _COST_MAX


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that decide the adapter's effect."""

    base_model: str
    """"" if the config names none: PEFT saves it so for a model that was made in memory."""
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    targeting: Targeting

    def check_targeted(self, path: str, layer: int, is_expert: bool, adapter: str) -> None:
        """Raise Invalid for a module that has tensors although the config excludes it."""
        if field := self.targeting.contradiction(path, layer, is_expert):
            raise malformed(
                adapter,
                f"{FILE_NAME}: {field} leaves out {shown(path)}, but the files hold tensors of it; config and weights "
                "are of different trainings",
            )

    def rank_of(self, path: str) -> int:
        """Return the rank that the config gives a module; `path` is its name in the base model."""
        found = self.rank_pattern.value_for(path)
        return self.rank if found is None else int(found)

    def scale_of(self, path: str, rank: int) -> float:
        """Return the factor of B: alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
        found = self.alpha_pattern.value_for(path)
        return (self.alpha if found is None else found) / (math.sqrt(rank) if self.use_rslora else rank)

    def identity(self) -> dict[str, Any]:
        """Return the fields that change the weights' effect, normalised, for the digest."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": self.rank_pattern.entries,
            "alpha_pattern": self.alpha_pattern.entries,
        }


def parse_config(data: bytes, adapter: str) -> PeftConfig:
    """Parse and check adapter_config.json; raises Invalid with the field's name and the way out."""
    try:
        fields = parse_object(data)
    except ValueError as error:
        raise malformed(adapter, f"{FILE_NAME}: {error}; save the adapter again") from error
    _check_type(fields, adapter)
    _check_supported(fields, adapter)
    return PeftConfig(
        base_model=_base_model(fields, adapter),
        rank=_rank(fields, adapter),
        alpha=_number(fields, "lora_alpha", adapter),
        use_rslora=_flag(fields, "use_rslora", adapter),
        rank_pattern=_pattern(fields, "rank_pattern", adapter),
        alpha_pattern=_pattern(fields, "alpha_pattern", adapter),
        targeting=_targeting(fields, adapter),
    )


def _targeting(fields: Mapping[str, Any], adapter: str) -> Targeting:
    try:
        return Targeting.of(fields)
    except ValueError as error:
        raise malformed(adapter, f"{FILE_NAME}: {error}; save the adapter again") from error


def _check_type(fields: Mapping[str, Any], adapter: str) -> None:
    peft_type = _required(fields, "peft_type", adapter)
    if peft_type != "LORA":
        why = _OTHER_METHODS.get(str(peft_type), "merge it into the base model, or train a LoRA")
        raise unsupported(adapter, f"{FILE_NAME}: peft_type is {_value(peft_type)}, only 'LORA' can be served; {why}")


def _check_supported(fields: Mapping[str, Any], adapter: str) -> None:
    for name, why in _REFUSED_WHEN_SET.items():
        if _is_set(fields.get(name)):
            raise unsupported(adapter, f"{FILE_NAME}: {name} is set; {why}")
    if (bias := fields.get("bias", "none")) != "none":
        raise unsupported(
            adapter,
            f"{FILE_NAME}: bias is {_value(bias)}; packed LoRA rows cannot carry it, train with bias='none'",
        )
    _check_initialisation(fields.get("init_lora_weights", True), adapter)
    for name in sorted(fields):
        known = name in _USED or name in _CHANGES_NOTHING or name in _REFUSED_WHEN_SET
        if not known and _is_set(fields[name]):
            raise unsupported(
                adapter,
                f"{FILE_NAME}: the field {shown(name)} is not known and may change what the adapter does; "
                "remove it if it does not",
            )


def _check_initialisation(initialisation: Any, adapter: str) -> None:
    if isinstance(initialisation, bool) or initialisation is None or initialisation in _PLAIN_INITIALISATIONS:
        return
    named = f"{FILE_NAME}: init_lora_weights is {_value(initialisation)}"
    word = initialisation.lower() if isinstance(initialisation, str) else ""
    if word.startswith(_RESIDUAL_INITIALISATIONS):
        why = (
            ", so A and B are relative to a changed base model; save it with path_initial_model_for_weight_conversion "
            "to make it a plain LoRA"
        )
    elif word == "loftq":
        why = ", so A and B repair a quantised base model that the engine does not have; train it without LoftQ"
    else:
        why = ", which is not known and may change the base model; train with init_lora_weights=true"
    raise unsupported(adapter, named + why)


def _base_model(fields: Mapping[str, Any], adapter: str) -> str:
    name = fields.get("base_model_name_or_path")
    if name is None or name == "":
        return ""
    if not isinstance(name, str) or not is_base_name(name):
        raise malformed(adapter, f"{FILE_NAME}: base_model_name_or_path is {_value(name)}; name the base model")
    return name


def _rank(fields: Mapping[str, Any], adapter: str) -> int:
    rank = _required(fields, "r", adapter)
    if type(rank) is not int or not 1 <= rank <= 65_536:
        raise malformed(adapter, f"{FILE_NAME}: r is {_value(rank)}; it is a whole number from 1")
    return rank


def _number(fields: Mapping[str, Any], name: str, adapter: str) -> float:
    value = _required(fields, name, adapter)
    if not _is_number(value):
        raise malformed(adapter, f"{FILE_NAME}: {name} is {_value(value)}; it is a number")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str, adapter: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise malformed(adapter, f"{FILE_NAME}: {name} is {_value(value)}; it is true or false")
    return bool(value)


def _pattern(fields: Mapping[str, Any], name: str, adapter: str) -> Pattern:
    entries = fields.get(name) or {}
    is_good = _is_rank if name == "rank_pattern" else _is_number
    if not isinstance(entries, dict) or not all(map(is_good, entries.values())):
        raise malformed(adapter, f"{FILE_NAME}: {name} is not an object of numbers")
    try:
        return Pattern({key: float(value) for key, value in entries.items()})
    except ValueError as error:
        raise malformed(adapter, f"{FILE_NAME}: {name}: {error}") from error


def _required(fields: Mapping[str, Any], name: str, adapter: str) -> Any:
    if fields.get(name) is None:
        raise malformed(adapter, f"{FILE_NAME}: the field {name} is missing; save the adapter with save_pretrained")
    return fields[name]


def _is_number(value: Any) -> bool:
    """Return True for a finite number of at most 1e30, which float32 can hold.

    Zero is allowed: PEFT serves such an adapter as the base model.
    """
    return type(value) in (int, float) and (value == 0 or 1e-30 <= abs(value) <= 1e30)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 65_536


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {}, "")


def _value(value: Any) -> str:
    return shown(value if isinstance(value, str) else repr(value)[:200])


class Pattern:
    """A compiled pattern map, in the file's order; raises ValueError for a key that is unsafe to match."""

    def __init__(self, entries: Mapping[str, float]) -> None:
        if len(entries) > ENTRIES_MAX:
            raise ValueError(f"it has {len(entries)} entries, more than the {ENTRIES_MAX} allowed")
        self.entries = tuple(entries.items())
        self._compiled = tuple((_compile(key), value) for key, value in self.entries)
        if sum(map(_cost, entries)) > _TOTAL_COST_MAX:
            raise ValueError("its regular expressions take too long together; name the modules instead")

    def value_for(self, path: str) -> float | None:
        """Return the value of the first key that matches the module's name, or None."""
        return next((value for key, value in self._compiled if key.match(path)), None)


def _compile(key: str) -> re.Pattern[str]:
    if len(key) > KEY_LENGTH_MAX:
        raise ValueError(f"the key {shown(key)} is too long")
    if _cost(key) > _COST_MAX:
        raise ValueError(f"the key {shown(key)} is a regular expression that can take too long; name the module")
    try:
        return re.compile(rf"(?:^|.*\.)(?:{key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the key {shown(key)} is not a regular expression ({error})") from error


def _cost(key: str) -> int:
    """Return a bound on the ways in which the matcher can try `key`: alternatives and repetitions multiply."""
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\[^1-9]", "c", key))
    # A later Python may read nested sets differently, and this one warns of them.
    if re.search(r"\\|\)[*+?{]|\(\?(?!:)", bare) or re.search(r"\[[^\]]*(?:\[|--|&&|~~|\|\|)", key):
        return _COST_MAX + 1
    bare = bare.replace("(?:", "(")
    cost: int = 64 ** min(4, len(re.findall(r"[*+?{]", bare)))
    for group in bare.split("("):
        cost *= group.count("|") + 1
    return cost
