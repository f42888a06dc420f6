"""A transformer with MLPs and attentions left out or narrowed, as a native Hugging Face model.

This file and ``families.py``, which says what differs between families of models, need torch and transformers only.
Both are copied beside the weights of every pruned model, so that
``AutoModel.from_pretrained(folder, trust_remote_code=True)`` works where effir_search is not installed.

Source: EffiR (Lei, He, Li, Yates), arXiv 2512.20612, sections on depth and width.
"""

import copy
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .families import Family, SubLayer, UserError, family_of


def _of_base(name: str) -> property:
    """Return a property that reads and writes the setting of that name of the base model's config."""
    return property(
        lambda config: getattr(config.base_config, name), lambda config, value: setattr(config.base_config, name, value)
    )


class EffirConfig(PretrainedConfig):
    """The config of the base model, and what of it is left. Layers have the 0-based numbers of the base model.

    There is no ``intermediate_size``: layers differ in it.

    Args:
        base_config: The base model's config, or the dict of it.
        mlp_widths: Units of each layer's MLP, one number a layer, 0 = dropped; None = all as in the base model.
        dropped_attention: Layers without attention. A layer without attention and MLP is the identity.
        base_model: Name of the base model.
        base_revision: Its revision on the hub.
        plan: One record for each pruning so far, in order: the layers that lost their ``mlp``, ``attention`` or whole
            ``block``; of those that were narrowed ``widths`` and ``units``; criterion, scores and whatever else led to
            it; JSON types. ``units`` are by layer the units of the base model's MLP that are left after this step, as
            hexadecimal digits: unit 0 is the highest bit of the first digit, 1 = left; ``surgery.kept_units`` reads it.
        **kwargs: See ``PretrainedConfig``.

    Raises:
        ValueError: A family that cannot be pruned, or layers or widths that the base model does not have.
    """

    model_type = "effir"
    sub_configs = {"base_config": AutoConfig}
    # dataclass(), which transformers applies to configs, would write one that compares only annotated fields.
    __eq__ = PretrainedConfig.__eq__

    vocab_size = _of_base("vocab_size")
    hidden_size = _of_base("hidden_size")
    num_hidden_layers = _of_base("num_hidden_layers")
    num_attention_heads = _of_base("num_attention_heads")
    num_key_value_heads = _of_base("num_key_value_heads")
    max_position_embeddings = _of_base("max_position_embeddings")
    pad_token_id = _of_base("pad_token_id")
    bos_token_id = _of_base("bos_token_id")
    eos_token_id = _of_base("eos_token_id")
    initializer_range = _of_base("initializer_range")
    use_cache = _of_base("use_cache")

    def __init__(
        self,
        base_config: PretrainedConfig | dict | None = None,
        mlp_widths: Iterable[int] | None = None,
        dropped_attention: Iterable[int] = (),
        base_model: str | None = None,
        base_revision: str | None = None,
        plan: Iterable[dict] = (),
        **kwargs: object,
    ) -> None:
        if isinstance(base_config, dict):
            settings = {name: value for name, value in base_config.items() if name != "model_type"}
            base_config = AutoConfig.for_model(base_config["model_type"], **settings)
        self.base_config = base_config
        self.base_model, self.base_revision, self.plan = base_model, base_revision, list(plan)
        self.mlp_widths, self.dropped_attention = [], sorted(set(dropped_attention))
        if base_config is not None:  # transformers also makes configs without arguments
            num_layers, width = base_config.num_hidden_layers, base_config.intermediate_size
            self.mlp_widths = [width] * num_layers if mlp_widths is None else list(mlp_widths)
            self._check(num_layers, width)
            # PretrainedConfig would reset it, also in the config of a base model that is in use.
            kwargs.setdefault("attn_implementation", base_config._attn_implementation)
        super().__init__(**kwargs)

    def _check(self, num_layers: int, width: int) -> None:
        family_of(self.base_config)
        if len(self.mlp_widths) != num_layers or not all(0 <= units <= width for units in self.mlp_widths):
            raise UserError(
                f"mlp_widths {self.mlp_widths} must be {num_layers} numbers from 0 to {width}, one for each layer"
            )
        if outside := [layer for layer in self.dropped_attention if not 0 <= layer < num_layers]:
            raise UserError(f"dropped_attention: there is no layer {outside[0]}; layers are 0 to {num_layers - 1}")


class PrunedLayer:
    """A layer that lacks its attention, its MLP or both: what its class is replaced by, a subclass of it.

    So the layer keeps what is found by class: checkpointing, recording of hidden states, device maps.
    """

    layer_class: type[nn.Module]
    family: Family
    attention_left: bool
    mlp_left: bool

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickle and copy the layer although its class is made at run time."""
        return _empty_layer, (self.layer_class, self.family, self.attention_left, self.mlp_left), self.__dict__


class PreNormLayer(PrunedLayer):
    """Add what is left of attention(norm(x)) and mlp(norm(x))."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """Map ``(batch, seq, hidden_size)`` to the same shape."""
        if self.attention_left:
            hidden_states = hidden_states + self._written(self.family.attention, hidden_states, **kwargs)
        if self.mlp_left:
            hidden_states = hidden_states + self._written(self.family.mlp, hidden_states)
        return hidden_states

    def _written(self, part: SubLayer, hidden_states: Tensor, **kwargs: object) -> Tensor:
        written = getattr(self, part.runs)(getattr(self, part.reads)(hidden_states), **kwargs)
        if isinstance(written, tuple):  # attention also returns its weights
            written = written[0]
        return written if part.writes == part.runs else getattr(self, part.writes)(written)


class PostNormLayer(PrunedLayer):
    """Where LN(x + F(x)) was dropped, LN(x) is left; without both it is the identity.

    Dropping the LayerNorms as well costs far more accuracy; without attention and MLP they would only repeat the one
    before.
    """

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor]:
        """Map ``(batch, seq, hidden_size)`` to the same shape."""
        attention, mlp = self.family.attention, self.family.mlp
        if self.attention_left:
            hidden_states = getattr(self, attention.runs)(hidden_states, *args, **kwargs)[0]
            if not self.mlp_left:
                hidden_states = self.get_submodule(mlp.writes)(hidden_states)
        elif self.mlp_left:
            hidden_states = self.get_submodule(attention.writes)(hidden_states)
        if self.mlp_left:
            hidden_states = getattr(self, mlp.runs)(getattr(self, mlp.reads)(hidden_states), hidden_states)
        return (hidden_states,) if self.family.returns_tuple else hidden_states


@cache
def _pruned_class(
    layer_class: type[nn.Module], family: Family, attention_left: bool, mlp_left: bool
) -> type[PrunedLayer]:
    style = PostNormLayer if family.post_norm else PreNormLayer
    facts = {
        "layer_class": layer_class,
        "family": family,
        "attention_left": attention_left,
        "mlp_left": mlp_left,
        "__module__": __name__,
    }
    return type(layer_class.__name__, (style, layer_class), facts)


def _empty_layer(*facts: object) -> PrunedLayer:
    pruned_class = _pruned_class(*facts)
    return pruned_class.__new__(pruned_class)


def has_part(layer: nn.Module, kind: str) -> bool:
    """Return whether a layer still has its "attention" or "mlp"."""
    return getattr(layer, f"{kind}_left", True)


def class_without(layer: nn.Module, family: Family, *, attention: bool, mlp: bool) -> type[nn.Module]:
    """Return the class by which a layer computes without its attention, its MLP or both; what is out stays out."""
    attention_left = has_part(layer, "attention") and not attention
    mlp_left = has_part(layer, "mlp") and not mlp
    if attention_left and mlp_left:
        return type(layer)
    return _pruned_class(getattr(layer, "layer_class", type(layer)), family, attention_left, mlp_left)


def drop_parts(layer: nn.Module, family: Family, *, attention: bool, mlp: bool) -> None:
    """Take the attention, the MLP or both out of a layer, in place; what is out already stays out."""
    layer.__class__ = class_without(layer, family, attention=attention, mlp=mlp)
    attention_left, mlp_left = has_part(layer, "attention"), has_part(layer, "mlp")
    if attention_left and mlp_left:
        return
    if not attention_left and not mlp_left:
        removed = [name for name, _module in layer.named_children()]
    else:
        removed = family.mlp.removed if attention_left else family.attention.removed
    for path in removed:
        parent, _, name = path.rpartition(".")
        holder = layer.get_submodule(parent)
        if hasattr(holder, name):
            delattr(holder, name)


@torch.no_grad()
def narrow_mlp(layer: nn.Module, family: Family, units: Tensor) -> None:
    """Keep only these units of a layer's MLP, in place, by cutting its matrices.

    Args:
        layer: A layer that has an MLP.
        family: Its family.
        units: ``(new_width,)`` int64, 0-based numbers of the units that stay.
    """
    output = layer.get_submodule(family.mlp.output)
    width = output.in_features
    for path in family.mlp.inputs:
        linear = layer.get_submodule(path)
        # ModernBERT's Wi holds the rows of all units twice: (2 * width, hidden_size).
        rows = torch.cat([units + start for start in range(0, linear.out_features, width)])
        linear.weight = _selected(linear.weight, 0, rows)
        if linear.bias is not None:
            linear.bias = _selected(linear.bias, 0, rows)
        linear.out_features = len(rows)
    output.weight = _selected(output.weight, 1, units)
    output.in_features = len(units)


def _selected(parameter: nn.Parameter, dim: int, numbers: Tensor) -> nn.Parameter:
    chosen = parameter.data.index_select(dim, numbers.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


class EffirModel(PreTrainedModel):
    """The base model of an ``EffirConfig`` without what was dropped; its layers keep their numbers.

    Attributes:
        model: The base model, without LM head and pooler. Its config is ``config.base_config``.
    """

    config_class = EffirConfig
    base_model_prefix = "model"
    # Of these the base model, which checks again, may support fewer.
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EffirConfig) -> None:
        super().__init__(config)
        family = family_of(config)
        base = config.base_config
        base.use_cache = False  # a text is read once; a caller can still ask for a cache
        options = {"add_pooling_layer": False} if family.has_pooler else {}
        # The default dtype is the one that from_pretrained and from_config were asked for.
        self.model = AutoModel.from_config(base, dtype=torch.get_default_dtype(), trust_remote_code=False, **options)
        for layer_idx, layer in enumerate(self.layers):
            width = config.mlp_widths[layer_idx]
            if 0 < width < base.intermediate_size:
                narrow_mlp(layer, family, torch.arange(width, device="cpu"))
            drop_parts(layer, family, attention=layer_idx in config.dropped_attention, mlp=width == 0)
        self.adopt(self.model)
        self.post_init()

    def adopt(self, base: PreTrainedModel) -> None:
        """Take a base model, with parts already dropped as the config says, in place of the present one."""
        self.model = base
        self.config._attn_implementation_internal = base.config._attn_implementation
        self.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        if family_of(self.config).causal:
            # A cache has no gaps: positions are counted by its first entry, masks made by the first of each kind.
            for entry, layer_idx in enumerate(self._layers_with_attention()):
                self.layers[layer_idx].get_submodule(family_of(self.config).attention.runs).layer_idx = entry

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, one for each of the base model's, also for those of which nothing is left."""
        return self.model.get_submodule(family_of(self.config).layers)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: object
    ) -> BaseModelOutput:
        """Return the base model's output; takes what the base model takes.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, 1 = real token.
            **kwargs: Handed on.
        """
        if kwargs.get("past_key_values") is None and self._makes_cache(kwargs.get("use_cache")):
            kwargs["past_key_values"] = self._new_cache()
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the base model's tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of the base model's tokens."""
        self.model.set_input_embeddings(value)

    @classmethod
    def from_pretrained(
        cls, *args: object, output_loading_info: bool = False, **kwargs: object
    ) -> "EffirModel | tuple":
        """Load a model as ``PreTrainedModel.from_pretrained`` does, but leave no weight to random numbers.

        Raises:
            ValueError: The files lack a tensor, hold one too many, or one of another shape.
        """
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = [f"no tensor {key}" for key in sorted(report["missing_keys"])]
        problems += [f"{key} is not part of the model" for key in sorted(report["unexpected_keys"])]
        problems += [f"{key} has another shape" for key, *_shapes in report["mismatched_keys"]]
        if problems:
            raise UserError(f"the weights do not fit config.json: {problems[0]} ({len(problems)} such problems)")
        return (model, report) if output_loading_info else model

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Return whether a cache is wanted, and the base model would make one for attentions it lacks, too."""
        if not (self.config.dropped_attention and family_of(self.config).causal):
            return False
        return self.config.use_cache if use_cache is None else use_cache

    def _layers_with_attention(self) -> list[int]:
        dropped = set(self.config.dropped_attention)
        return [layer_idx for layer_idx in range(self.config.num_hidden_layers) if layer_idx not in dropped]

    def _new_cache(self) -> DynamicCache:
        """Return a cache with one entry for each attention that is left."""
        left = self._layers_with_attention()
        config = copy.copy(self.config.base_config)
        config.num_hidden_layers = len(left)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[layer_idx] for layer_idx in left]
        return DynamicCache(config=config)
