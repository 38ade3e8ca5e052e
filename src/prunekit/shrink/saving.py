"""The form in which a shrunk model is saved, decided before anything is computed.

`stock`: every block is as wide as the next, and the model's own class builds those widths from a changed config.json, so any runtime
loads it. `free`: config.json keeps the widths of before, which the weights do not fit, and notes the true shapes; `prunekit.load`
builds them, and so does a small file of code in the folder. Which fields of a config say how wide a block is, is listed for no
family: fields are changed, the model is built on the meta device, and everything it is then made of is compared with what is wanted.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ..checkpoint.writer import MODELING_NAME
from ..errors import InputError
from ..model.anatomy import Anatomy, is_linear
from ..model.resizing import REMOVED, SHAPES, resize
from ..model.source import StreamedModel, resizing_code
from .plan import Plan, Structures
from .slicing import Slicer
from .sublayers import within
from .units import ATTENTION, HEADS, Structure

# what configs call the width of the multilayer perceptron where they leave it to a default
_UNSET_WIDTHS = ("n_inner", "ffn_hidden_size", "intermediate_size", "ffn_dim")
# configs that refuse heads which do not divide the hidden size, though the class computes with them, and the model type that computes
# the same and does not: what it is loaded as, and what must be said for it
_TWINS: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("mistral", {"sliding_window": None})}
_OURS = (SHAPES, "auto_map")
# what configs say of themselves
_LABELS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "_name_or_path", SHAPES}
# what blocks may note of their own place, for caches
_PLACES = frozenset({"layer_idx", "layer_index", "layer_id", "block_idx", "training"})


@dataclass(frozen=True)
class Form:
    """How a shrunk model is written.

    Attributes:
        kind: the class it is loaded as; another than the source's where that one's config refuses widths that it could compute with.
        config: what config.json will hold.
        files: file name -> text of what else must be written; none where the form is stock.
        reason: why the form is not stock; None where it is.
        renamed: number of each block that stays -> its new number.
        names: name in the source model of every parameter and persistent buffer that stays, and of the biases that linears are
            given -> the name it is stored under.
        zeros: number of a block in the source model -> the biases its class wants besides, which are zero: stored name -> shape.
    """

    kind: str
    config: dict[str, Any]
    files: dict[str, str]
    reason: str | None
    renamed: dict[int, int]
    names: dict[str, str]
    zeros: dict[int, dict[str, tuple[int, ...]]]

    @property
    def stock(self) -> bool:
        """Whether transformers loads it without code from the folder, and any other runtime that knows the model's class."""
        return self.reason is None

    @property
    def texts(self) -> dict[str, str]:
        """Name -> text of every file that is written in the place of the source's."""
        return {
            **self.files,
            "config.json": json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        }


@dataclass(frozen=True)
class NarrowConfig:
    """What config.json holds with a narrower residual stream, and the models that are built of it and of one with twice that width."""

    config: dict[str, Any]
    built: PreTrainedModel
    doubled: PreTrainedModel


def choose_form(source: StreamedModel, structures: Structures, plan: Plan, *, biased: Collection[str] = ()) -> Form:
    """The form in which a model is saved when a plan is carried out: stock if its class can be built so, else free.

    Args:
        source: the model before.
        structures: of its blocks.
        plan: what is kept.
        biased: names in the source model of linears without a bias that will be given one, like `model.layers.3.mlp.down_proj`.

    Raises:
        InputError: neither form can hold what the plan leaves.
    """
    chooser = FormChooser(
        source.module, source.anatomy, source.reader.config, source.key_of, structures, plan, biased=biased
    )
    return chooser.stock() or chooser.free()


class FormChooser:
    """Tries configs for what a plan leaves of a model, which may be on the meta device.

    `config` is the model's config.json, `key_of` parameter name -> stored name, the rest as for `choose_form`. Raises `InputError`
    where the plan removes what the model cannot do without.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        anatomy: Anatomy,
        config: Mapping[str, Any],
        key_of: Mapping[str, str],
        structures: Structures,
        plan: Plan,
        *,
        biased: Collection[str] = (),
    ) -> None:
        self._module: Any = module
        self._anatomy = anatomy
        self._key_of = key_of
        self._structures = structures
        self._plan = plan
        self._config = {name: value for name, value in config.items() if SHAPES not in config or name not in _OURS}
        self._noted = config.get(SHAPES, {"tensors": {}, "attributes": {}})
        self._class = type(module).__name__
        self._blocks = anatomy.blocks_name + "."
        self._renamed = {old: new for new, old in enumerate(plan.kept_blocks)}
        self._refuse_never()
        self._base = self._build({})
        self._biased = [f"{name}.bias" for name in biased if self._number(name) in self._renamed]
        self._removed = self._left_out()
        self._wanted = self._shapes()

    def stock(self) -> Form | None:
        """The stock form, where the class can build what is left."""
        self._why = "its blocks have different widths"
        if self._removed:
            self._why = "some of its blocks have no attention or no perceptron"
            return None
        if not self._plan.uniform(self._structures):
            return None
        depth = self._depth()
        cut = [each for each in self._structures[self._plan.kept_blocks[0]] if self._ratio(each) != (1, 1)]
        settings = list(self._flags())
        refusals = []
        twin = _TWINS.get(self._config.get("model_type", ""), ())[:1]
        for kind, widths, flags in product((None, *twin), product(*map(self._widths, cut)), settings):
            changes = {**depth, **flags, **{name: value for some in widths for name, value in some.items()}}
            try:
                built = self._build(changes, kind)
            except Exception as problem:  # whatever a family's own code stumbles over where sizes do not go together
                refusals.append(" ".join(str(problem).split()[-24:]))
                continue
            found = _shapes_of(built)
            extra = {name: shape for name, shape in found.items() if name not in self._wanted}
            only_biases = all(flags and name.endswith(".bias") for name in extra)
            fitting = all(found.get(name) == shape for name, shape in self._wanted.items())
            alike = self._difference(built, flags) is None and (kind is None or self._agreed(built, changes))
            if fitting and only_biases and alike:
                names = self._stored_names()
                config, zeros = self._changed(changes, kind), self._zeros(extra, names)
                return Form(type(built).__name__, config, {}, None, self._renamed, names, zeros)
        self._why = f"{self._class} has no config for these widths" + ("" if settings == [{}] else " with biases")
        self._why += f" ({refusals[0]})" if refusals else ""
        return None

    def free(self) -> Form:
        """The free form, asked for where `stock` has found none. Raises `InputError` where there is none either."""
        own = type(self._module.config).model_type == self._config.get("model_type")
        if not own or not type(self._module).__module__.startswith("transformers."):
            what = "is code that the folder brings" if own else "is a part of a larger model"
            raise InputError(
                f"{self._class} {what}, and {self._why}: it can be saved only where its config can say what is left"
            )
        changes = self._depth()
        for structure in self._structures[self._plan.kept_blocks[0]]:
            stays = not self._plan.leaves_out(structure)
            if stays and structure.resizes == "together" and self._ratio(structure) != (1, 1):
                changes.update(next(self._widths(structure), {}))
        built = self._build(changes)
        found = _shapes_of(built)
        empty = {f"{name}.{answer['empty']}" for name, answer in self._removed.items() if answer["empty"]}
        tensors = {
            name: list(shape) for name, shape in self._wanted.items() if found.get(name) != shape and name not in empty
        }
        shapes: dict[str, Any] = {"tensors": tensors, "attributes": self._attributes(built)}
        if self._removed:
            shapes[REMOVED] = self._removed
        dropping = len(self._renamed) < len(self._anatomy.blocks)
        if tensors and not any(name in found for name in tensors):
            raise InputError(
                f"{self._class} has no biases where compensation adds them, and transformers would load the model without: choose a "
                "compensation without biases"
            )
        if all(name in found or name.endswith(".bias") for name in tensors):
            resize(built, shapes)
        difference = self._difference(built, ())
        if difference is not None or _shapes_of(built) != self._wanted or not (tensors or self._removed):
            raise InputError(
                f"what the plan leaves cannot be saved as a {self._class}: {difference or 'its class builds other tensors'}; "
                f"{'keep all blocks' if dropping else 'keep all units'}"
            )
        config = self._changed(changes)
        config[SHAPES] = shapes
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING_NAME.removesuffix('.py')}.{self._class}"}
        code = {MODELING_NAME: resizing_code(self._module)}
        return Form(self._class, config, code, self._why, self._renamed, self._own_names(), {})

    def narrowed(self, width: int) -> NarrowConfig:
        """A config with another width of the residual stream, and everything else of the same size, as found as the rest is.

        Raises `InputError` where the class builds no such model, or where more than tensors' shapes would follow.
        """
        config = self._module.config.get_text_config()
        before, changes = int(config.hidden_size), {"hidden_size": width}
        if not isinstance(getattr(type(config), "head_dim", None), property):  # Falcon's config always divides
            changes["head_dim"] = getattr(config, "head_dim", None) or before // config.num_attention_heads
        refusals = []
        for kind in (None, *_TWINS.get(self._config.get("model_type", ""), ())[:1]):
            try:
                built, doubled = (self._build({**changes, "hidden_size": size}, kind) for size in (width, 2 * width))
            except Exception as problem:  # whatever a family's own code stumbles over where sizes do not go together
                refusals.append(" ".join(str(problem).split()[-24:]))
                continue
            why = self._difference(built, (), [(width, before)])
            if why is None and (kind is None or self._agreed(built, changes)):
                return NarrowConfig(self._changed(changes, kind), built, doubled)
            refusals.append(why or f"{type(built).__name__} would be told something else")
        raise InputError(
            f"the residual stream of {self._class} cannot have {width} channels with everything else as it is: {refusals[0]}"
        )

    def _zeros(
        self, extra: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
    ) -> dict[int, dict[str, tuple[int, ...]]]:
        """Biases of the shrunk model by the number of their block in the source, under the names they are stored under."""
        numbers = {new: old for old, new in self._renamed.items()}
        zeros: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, shape in extra.items():
            new = self._number(name)
            rest = name.removeprefix(f"{self._blocks}{new}").removesuffix("bias")
            weight = names[f"{self._blocks}{numbers[new]}{rest}weight"]
            zeros.setdefault(numbers[new], {})[f"{weight.removesuffix('weight')}bias"] = shape
        return zeros

    def _refuse_never(self) -> None:
        for index in self._renamed:
            for structure in self._structures[index]:
                kept = len(self._plan.kept(structure))
                if kept in (0, structure.count) or structure.resizes == "alone":
                    continue
                if structure.resizes == "never":
                    raise InputError(
                        f"'{structure.name}' of block {index}: {self._class} does not compute the same with fewer of its "
                        f"{structure.count} {structure.kind} units, which can only stay whole"
                    )
                others = (each for other in self._renamed for each in self._structures[other])
                counts = {len(self._plan.kept(each)) for each in others if each.name == structure.name} - {0}
                if len(counts) > 1:
                    raise InputError(
                        f"'{structure.name}' of block {index}: {self._class} takes the sizes of {structure.kind} from its config, so "
                        f"every block must keep as many units, not {min(counts)} to {max(counts)}: use --shape uniform"
                    )

    def _left_out(self) -> dict[str, dict[str, Any]]:
        """Modules of the shrunk model that are gone, also those that were so before, and how a stub answers in the place of each."""
        gone = {
            name: dict(answer)
            for name, answer in self._noted.get(REMOVED, {}).items()
            if self._number(name) in self._renamed
        }
        for old in self._renamed:
            for each in self._structures[old]:
                if each.sublayer is not None and self._plan.leaves_out(each):
                    gone |= {
                        f"{self._blocks}{old}.{name}": dict(answer) for name, answer in each.sublayer.modules.items()
                    }
        return {self._renumbered(name): answer for name, answer in gone.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        self._gone: set[str] = set()
        wanted = {name: shape for name, shape in _shapes_of(self._module).items() if not name.startswith(self._blocks)}
        for old, new in self._renamed.items():
            shapes = _shapes_of(self._module.get_submodule(f"{self._blocks}{old}"))
            slicer = Slicer(self._structures[old], self._plan, shapes)
            kept = {name: slicer.shape(name, shape) for name, shape in shapes.items() if name not in slicer.gone}
            wanted |= {f"{self._blocks}{new}.{name}": shape for name, shape in kept.items()}
            self._gone |= {f"{self._blocks}{old}.{name}" for name in slicer.gone}
        outputs = {f"{linear.full_name}.bias": linear.out_features for linear in self._anatomy.linears()}
        for name in self._biased:
            wanted.setdefault(self._renumbered(name), (outputs[name],))
        return wanted

    def _renumbered(self, name: str) -> str:
        """What a parameter of a block that stays is called in the shrunk model."""
        old = self._number(name)
        return f"{self._blocks}{self._renamed[old]}{name.removeprefix(f'{self._blocks}{old}')}"

    def _number(self, name: str) -> int:
        """The number of the block that something named is in."""
        return int(name.removeprefix(self._blocks).split(".", 1)[0])

    def _ratio(self, structure: Structure) -> tuple[int, int]:
        """Inputs of a consumer that stay, and those it has as the class builds it; (1, 1) where they are the same."""
        built = self._base.get_submodule(structure.consumer.full_name).weight.shape
        whole = built[0 if structure.consumer.transposed else 1]
        kept = len(self._plan.kept(structure)) * structure.size
        return (1, 1) if kept == whole else (kept, whole)

    def _widths(self, structure: Structure) -> Iterator[dict[str, int]]:
        """Changes of the config that may lead to the kept units of a structure, in the words of transformers."""
        config = self._module.config.get_text_config()
        kept, whole = self._ratio(structure)
        if structure.kind == ATTENTION:
            heads = {name: getattr(config, name) for name in HEADS if type(getattr(config, name, None)) is int}
            if heads and all(value * kept % whole == 0 for value in heads.values()):
                size = whole // config.num_attention_heads
                yield {**{name: value * kept // whole for name, value in heads.items()}, "head_dim": size}
            return
        units = whole // structure.size
        for name, value in config.to_dict().items():
            if value == units or (value is None and name in _UNSET_WIDTHS):
                yield {name: kept // structure.size}

    def _depth(self) -> dict[str, Any]:
        """Changes of the config that leave blocks out; fields that say something of every block lose those that go."""
        config = self._module.config.get_text_config()
        blocks, kept = len(self._anatomy.blocks), self._plan.kept_blocks
        if len(kept) == blocks:
            return {}
        changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
        for name, value in config.to_dict().items():
            if isinstance(value, (list, tuple)) and len(value) == blocks and "layer" in name:
                changes[name] = [value[index] for index in kept]
        if type(first := getattr(config, "max_window_layers", None)) is int:  # from this block on attention slides
            changes["max_window_layers"] = sum(index < first for index in kept)
        return changes

    def _flags(self) -> Iterator[dict[str, bool]]:
        """Settings that may give the linears their biases, the fewest first; nothing where they have them."""
        there = _shapes_of(self._base)
        if all(name in there for name in self._biased):
            yield {}
            return
        config = self._module.config.get_text_config().to_dict()
        names = [name for name, value in config.items() if value is False and "bias" in name]
        for some in chain.from_iterable(combinations(names, taken) for taken in range(1, len(names) + 1)):
            yield dict.fromkeys(some, True)

    def _changed(self, changes: Mapping[str, Any], twin: str | None = None) -> dict[str, Any]:
        """config.json with some fields changed, under the names it uses itself; or that of a twin, which has other defaults."""
        config: dict[str, Any] = copy.deepcopy(self._config)
        if twin is not None:
            defaults, own = CONFIG_MAPPING[twin]().to_dict(), self._module.config.to_dict()
            unsaid = {name: own[name] for name in own.keys() & defaults.keys() if own[name] != defaults[name]}
            if config.keys() & {"rope_theta", "rope_scaling"}:  # how releases before transformers 5 say it
                unsaid.pop("rope_parameters", None)
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[twin]]
            says = {"architectures": [kind.__name__], "transformers_version": transformers.__version__}
            return unsaid | config | _TWINS[own["model_type"]][1] | dict(changes) | says | {"model_type": twin}
        text = self._module.config.get_text_config()
        section = config if type(text).model_type == config.get("model_type") else config.setdefault("text_config", {})
        for name, value in changes.items():
            section.pop(name, None)
            section[text.attribute_map.get(name, name)] = value
        return config

    def _build(self, changes: Mapping[str, Any], twin: str | None = None) -> PreTrainedModel:
        """The model that the class, or its twin, makes of a changed config, on the meta device."""
        raw = self._changed(changes, twin)
        own = type(self._module.config) if twin is None else CONFIG_MAPPING[twin]
        kind = type(self._module) if twin is None else MODEL_FOR_CAUSAL_LM_MAPPING[own]
        whole = own if raw.get("model_type") == own.model_type else CONFIG_MAPPING[raw["model_type"]]
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = whole.from_dict(raw)
            model = kind._from_config(config if isinstance(config, own) else config.get_text_config())
        assert isinstance(model, PreTrainedModel)
        return model.eval()

    def _attributes(self, built: nn.Module) -> dict[str, Any]:
        """What modules keep beside their tensors and is not what the class makes of its config."""
        values: dict[str, Any] = {}
        for name, value in self._noted["attributes"].items():
            if self._number(name) in self._renamed:
                values[self._renumbered(name)] = value
        for old, new in self._renamed.items():
            for structure in self._structures[old]:
                if self._plan.leaves_out(structure):
                    continue
                for attribute in structure.scaled:
                    path, _, leaf = attribute.rpartition(".")
                    value = getattr(self._module.get_submodule(f"{self._blocks}{old}.{path}".rstrip(".")), leaf)
                    kept = len(self._plan.kept(structure))
                    values[f"{self._blocks}{new}.{attribute}"] = value // structure.count * kept
        return {name: value for name, value in values.items() if _attribute(built, name) != value}

    def _difference(self, built: nn.Module, told: Collection[str], also: Sequence[tuple[int, int]] = ()) -> str | None:
        """How the modules of a built model differ from the source's, apart from widths, their place and settings it was `told`.

        `also` are sizes of other things, each what it is to be and what it is.
        """
        modules = dict(self._module.named_modules())
        numbers = {f"{self._blocks}{new}": f"{self._blocks}{old}" for old, new in self._renamed.items()}
        first = self._plan.kept_blocks[0]
        for name, module in built.named_modules():
            block = f"{self._blocks}{self._number(name)}" if name.startswith(self._blocks) else ""
            if within(name, self._removed):
                continue
            before = modules.get(numbers[block] + name.removeprefix(block) if block else name)
            if before is None or _role(before, self._module) != _role(module, built):
                return f"'{name}' would be a {type(module).__name__}"
            if is_linear(module) or isinstance(
                module, PreTrainedModel
            ):  # shapes are compared; a model names its folder
                continue
            ours, theirs = _values(module), _values(before)
            if not block:  # may have something for a kind of blocks of which none is left
                theirs = {key: value for key, value in theirs.items() if key in ours}
            index = int(numbers[block].removeprefix(self._blocks)) if block else first
            stay = [each for each in self._structures[index] if not self._plan.leaves_out(each)]
            ratios = [self._ratio(each) for each in stay]
            ratios += [(len(self._plan.kept(each)), each.count) for each in stay]
            for key in sorted((ours.keys() | theirs.keys()) - set(told)):
                new, old = ours.get(key), theirs.get(key)
                if new != old and not _scaled(new, old, [*ratios, *also]):
                    return f"'{key}' of '{name}' would change from {old} to {new}"
        return None

    def _agreed(self, twin: PreTrainedModel, changes: Mapping[str, Any]) -> bool:
        """Whether the configs of a twin and the source say the same wherever both say something and nothing was changed."""
        ours, theirs = twin.config.to_dict(), self._module.config.to_dict()
        common = (ours.keys() & theirs.keys()) - changes.keys() - _LABELS
        return all(ours[name] == theirs[name] for name in common)

    def _own_names(self) -> dict[str, str]:
        """Parameters under their own names: for classes that a folder brings, transformers does not look up names of older releases."""
        names = {name: name for name in self._key_of if not name.startswith(self._blocks)}
        inside = [name for name in self._key_of if name.startswith(self._blocks)]
        return names | {
            name: self._renumbered(name)
            for name in (*inside, *self._biased)
            if self._number(name) in self._renamed and name not in self._gone
        }

    def _stored_names(self) -> dict[str, str]:
        """Parameters under the names they have in the source's files, but for the numbers of blocks."""
        names = {}
        for name, key in self._key_of.items():
            if not name.startswith(self._blocks):
                names[name] = key
                continue
            old = self._number(name)
            if old in self._renamed:
                names[name] = _renumber(key, old, self._renamed[old])
        for name in self._biased:
            weight = names[f"{name.removesuffix('bias')}weight"]
            names.setdefault(name, f"{weight.removesuffix('weight')}bias")
        return names


def _shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


def _role(module: nn.Module, model: nn.Module) -> str:
    """What a module is in its model: `LlamaMLP` in a `LlamaForCausalLM` is an `MLP`."""
    return type(module).__name__.removeprefix(type(model).__name__.removesuffix("ForCausalLM"))


def _values(module: nn.Module) -> dict[str, Any]:
    """What a module keeps in plain attributes, and the shapes of its buffers."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple)) and name not in _PLACES and not name.startswith("_")
    }
    return plain | {name: tuple(tensor.shape) for name, tensor in module.named_buffers(recurse=False)}


def _scaled(new: Any, old: Any, ratios: Sequence[tuple[int, int]]) -> bool:
    """Whether whole numbers are to each other as one of the ratios; of tuples, whether each is that or the same."""
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return all(ours == theirs or _scaled(ours, theirs, ratios) for ours, theirs in zip(new, old, strict=True))
    return type(new) is int and type(old) is int and any(old * a == new * b for a, b in ratios)


def _attribute(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _renumber(key: str, old: int, new: int) -> str:
    """The stored name of a block's tensor when the block gets another number: the first number in it."""
    parts = key.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    if parts[place] != str(old):
        raise InputError(
            f"tensor '{key}' of block {old} is stored under a name without that number: blocks cannot be dropped"
        )
    return ".".join([*parts[:place], str(new), *parts[place + 1 :]])
