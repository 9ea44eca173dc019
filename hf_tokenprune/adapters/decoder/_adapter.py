"""What vision-language models with a causal decoder share: image tokens that leave inside the language model.

Placeholders, processors, labels and the scatter of image features stay stock. A family (one file) tells the shape of
its model and how many tokens an image has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ...errors import UnsupportedModelError
from ...signals import Stage
from .._capture import disable_capture, is_captured
from .._swap import check_copies, check_swappable, swap_class
from .._views import ImageView, raster
from ._encoder import check_encoder, encoder_adapter
from ._entrance import CountProposals, EnterDecoder
from ._exit import LeaveDecoder
from ._images import FindImages, GivenImages, ImageTokens
from ._layer import LAYER_CLASSES, PrunedDecoderLayer
from ._parts import DecoderParts
from ._short import OTHERWISE, ShortFeatures, ShortLength, check_short
from ._side_inputs import SideInputs
from ._tower import (
    HAS_CLS,
    Choice,
    ChooseStates,
    attach_tower,
    detach_projector,
    feature_block,
    scoring_attention,
    tower_blocks,
)


@dataclass
class DecoderState:
    """What a pruned language model knows. No tensors: it is copied, pickled and moved with the module.

    Attributes:
        stages: in the order tokens pass them.
        tower: those in the blocks of the vision tower.
        short: prompts are short: tokens leave in ``get_image_features``, and the language model is stock.
        handles: of the hooks; they follow a copy of the model.
        config: of the whole model, set by the engine.
    """

    stages: tuple[Stage, ...]
    tower: tuple[Stage, ...] = ()
    short: bool = False
    handles: list[Any] = field(default_factory=list)
    config: Any = None
    recorders: list[Any] = field(default_factory=list, compare=False)


class DecoderAdapter(DecoderParts):
    """Base of the adapters of vision-language models. One instance serves all models of its family."""

    provides: ClassVar[dict[str, frozenset[str]]] = {
        "vision_tower": frozenset(
            {"attention", "cls_attention", "received_attention", "queries", "keys", "values"}
            | {"tower_features", "earlier_attention"}
        ),
        "entrance": frozenset({"text"}),
        "after_block": frozenset({"text", "text_attention", "text_scores", "keys", "text_keys", "layer_scores"}),
    }
    """What stages may read beside the tokens, by ``Stage.where``."""
    full_grid_heads: ClassVar[dict[type[PreTrainedModel], str]] = {}
    placeholders: ClassVar[dict[str, str]] = {"image": "image_token_id"}
    """Kinds of visual input, and the field of the model's config that names their placeholder token."""
    no_videos: ClassVar[str] = "this family takes no videos"
    """Why videos cannot be told from images in this family; empty where they can, and their frames too."""
    tower_grid: ClassVar[str] = ""
    """Why tokens cannot be chosen in the vision tower of this family; empty where they can."""
    tile_option: ClassVar[str] = ""
    """What to tell the processor, in families that cut images into tiles of equal size, to have one tile an image."""

    def no_short_prompts(self, model: PreTrainedModel) -> str:
        """Why an image cannot have fewer placeholders; empty where it can."""
        several = "image tokens have positions in time, row and column, which a shorter prompt does not tell"
        return several if self.position_axes > 1 else ""

    def check_short_prompts(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedModelError where an image cannot have fewer placeholders, whatever is pruned."""
        if reason := self.no_short_prompts(model):
            raise UnsupportedModelError(f"no short prompts for {model.config.model_type!r}: {reason}. {OTHERWISE}")

    def processor_name(self, model: PreTrainedModel) -> str:
        """The class of the processors that write its prompts; empty where Transformers does not say."""
        return PROCESSOR_MAPPING_NAMES.get(model.config.model_type) or ""

    def short_length(self, model: PreTrainedModel, stages: tuple[Stage, ...]) -> ShortLength:
        """How many tokens of an image stay; for a model that ``check`` has passed."""
        protected = 0
        for choice in (self.choice(model, stage) for stage in stages if stage.where == "vision_tower"):
            assert isinstance(choice, ChooseStates)
            # "default" drops the first token, which is then no feature
            drops_first = getattr(model.config, "vision_feature_select_strategy", None) == "default"
            protected = choice.num_protected - drops_first
        tile = self.shape(model).tower_tokens if self.tile_option else None
        return ShortLength(stages, protected, tile, self.tile_option)

    def scoring_block(self, model: PreTrainedModel) -> int:
        """Index of the block of the vision tower by whose attention tokens are chosen: that which makes the features.

        Raises:
            UnsupportedModelError: tokens cannot be chosen there.
        """
        return feature_block(self.tower(self.inner(model)), self.feature_layer(model))

    def choice(self, model: PreTrainedModel, stage: Stage) -> Choice:
        """The hook that makes the vision tower choose; for a model that ``check`` has passed."""
        layer = self.feature_layer(model)
        assert not isinstance(layer, list)
        has_cls = HAS_CLS[self.tower(self.inner(model)).config.model_type]
        # "default" drops the first token behind the tower, also where it is a patch that could have been chosen.
        drops_first = getattr(model.config, "vision_feature_select_strategy", None) == "default"
        return ChooseStates(stage, layer, has_cls, int(has_cls or drops_first), self.squares(model))

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        """How many tokens each image of a forward of ``inner`` has, and which are newlines; in the prompts' order."""
        return given.as_encoded()

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        """How the language model sees the one image of a prompt, of ``size`` (height, width) pixels.

        Args:
            inputs: what the processor made of the prompt.
        """
        grid = self.token_grid(model)
        _, total, _ = self.image_tokens(model, None)
        return [ImageView(raster(grid, total - grid[0] * grid[1]), inputs["pixel_values"][0])]

    def token_grid(self, model: PreTrainedModel) -> tuple[int, int]:
        """Rows and columns of tokens of what the vision tower encodes as one image."""
        (rows, columns), side = self.tower_shape(model, None).grid, self.squares(model).side
        return rows // side, columns // side

    def tower_views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[ImageView]:
        """What the vision tower encodes of the one image of a prompt; the patches are numbered through."""
        height, width = self.tower_shape(model, None).grid
        pixels = inputs["pixel_values"].flatten(0, -4)
        return [ImageView(raster((height, width), i * height * width), each) for i, each in enumerate(pixels)]

    def take_side_inputs(self, inner: Any, call: dict[str, Any]) -> SideInputs | None:
        """What is added to tokens between layers of the language model, taken out of the arguments of its ``call``."""
        return None

    def check(
        self,
        model: PreTrainedModel,
        stages: tuple[Stage, ...],
        *,
        tower: tuple[Stage, ...] = (),
        short: bool = False,
    ) -> None:
        """Raise UnsupportedModelError where image tokens cannot leave; changes nothing.

        Args:
            tower: pruning points in the blocks of the vision tower, of a method for vision encoders.
            short: image tokens leave before the prompt.
        """
        inner = self.inner(model)
        if short:
            check_short(model, self.shape(model), stages)
        if tower:
            check_encoder(self.tower(inner), tower)
        text = self.decoder(inner).config
        kind = text.model_type
        if kind not in LAYER_CLASSES:
            raise UnsupportedModelError(
                f"the language model is a {kind!r}; its layers are known for {', '.join(sorted(LAYER_CLASSES))}"
            )
        layer_types = set(getattr(text, "layer_types", None) or ())
        slides = LAYER_CLASSES[kind].always_slides or "sliding_attention" in layer_types
        if getattr(text, "sliding_window", None) and slides:
            raise UnsupportedModelError(
                "the language model attends in a sliding window, which counts positions that pruning changes; for "
                "prompts within the window set model.config.text_config.sliding_window = None before loading: the "
                "result is the same"
            )
        for stage in stages:
            in_tower = stage.where == "vision_tower"
            if stage.videos_only and self.no_videos:
                raise UnsupportedModelError(
                    f"{stage.title} prunes videos; {self.no_videos} ({model.config.model_type!r}). Use a "
                    "method that prunes images, such as divprune"
                )
            if stage.videos_only and stages[0].where == "vision_tower":
                raise UnsupportedModelError(
                    f"{stage.title} compares the tokens of frames, and {stages[0].title} leaves "
                    "others in each. Use it without a method that prunes at the vision tower"
                )
            if in_tower and self.tower_grid:
                raise UnsupportedModelError(
                    f"tokens cannot be chosen in the vision tower of {model.config.model_type!r}: {self.tower_grid}. "
                    "Use a method that works in the decoder, such as divprune"
                )
            provided = self.provides[stage.where]
            if in_tower and self.squares(model).side > 1:
                provided -= {"attention"}  # a map of all patches of a large image would take gigabytes
            if missing := stage.needs - provided:
                raise UnsupportedModelError(
                    f"{stage.title} needs {', '.join(sorted(missing))}, which the adapter for "
                    f"{model.config.model_type!r} does not provide there (it provides: {', '.join(sorted(provided))})"
                )
            if in_tower:
                scoring_attention(self.tower(inner), self.scoring_block(model))
                self.check_earlier(model, stage)
            if stage.layer >= 0 and (others := layer_types - {"full_attention"}):
                raise UnsupportedModelError(
                    f"{stage.title} makes tokens leave behind decoder layer {stage.layer}; layers of {kind!r} "
                    f"are of {', '.join(sorted(others))} too, which have no attention to read and states that padding "
                    "changes. Use a method that works at the entrance, such as divprune"
                )
        check_copies(model, self._changed(model, stages, tower))
        for index, block in enumerate(self.blocks(model)):
            check_swappable(block, LAYER_CLASSES[kind].stock_class, f"decoder layer {index}")

    def check_copies(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedModelError where PEFT has copied what pruning has changed."""
        for state in self.states(model):
            check_copies(model, self._changed(model, state.stages, state.tower))

    def _changed(self, model: PreTrainedModel, stages: tuple[Stage, ...], tower: tuple[Stage, ...]) -> list[nn.Module]:
        """The blocks that pruning so changes, or whose attention it reads."""
        in_tower = tower or any(stage.where == "vision_tower" for stage in stages)
        return [*self.blocks(model), *(tower_blocks(self.tower(self.inner(model))) if in_tower else ())]

    def check_earlier(self, model: PreTrainedModel, stage: Stage) -> None:
        """Raise UnsupportedModelError where the vision tower has no earlier block such as ``stage`` wants to read."""
        if "earlier_attention" not in stage.needs:
            return
        scoring, block = self.scoring_block(model), stage.earlier_block
        windows = self.tower_shape(model, None).windows
        if not 0 <= block < scoring or (windows and windows[block]):
            whole = [b for b in range(scoring) if not (windows and windows[b])]
            raise UnsupportedModelError(
                f"{stage.title} reads the attention of block {block} of the vision tower and of block "
                f"{scoring}, which makes the features: expected an earlier one that attends to whole images, of {whole}"
            )

    def attach(
        self,
        model: PreTrainedModel,
        stages: tuple[Stage, ...],
        *,
        tower: tuple[Stage, ...] = (),
        short: bool = False,
    ) -> None:
        """Make the model prune. Call ``check`` before."""
        inner = self.inner(model)
        decoder = self.decoder(inner)
        state = DecoderState(stages, tower, short)
        decoder.__dict__["token_prune"] = state
        if tower:
            encoder = self.tower(inner)
            encoder_adapter(encoder).attach(encoder, tower, restore=True)
        for stage in stages:
            if stage.where == "vision_tower":
                encoder, projector = self.tower(inner), inner.get_submodule(self.connector_name)
                state.handles += attach_tower(encoder, self.scoring_block(model), projector, self.choice(model, stage))
        if short:
            inner.__dict__["get_image_features"] = ShortFeatures(inner, self.short_length(model, stages))
            return
        for block in self.blocks(model):
            swap_class(block, LAYER_CLASSES[decoder.config.model_type])
        state.handles += [
            inner.register_forward_pre_hook(FindImages(self), with_kwargs=True),
            decoder.register_forward_pre_hook(EnterDecoder(), with_kwargs=True),
            decoder.register_forward_hook(LeaveDecoder(), with_kwargs=True),
        ]
        if model is not inner:
            state.handles.append(model.register_forward_pre_hook(CountProposals(), with_kwargs=True))

    def detach(self, model: PreTrainedModel) -> None:
        """Undo ``attach``, whatever part of it there is."""
        inner = self.inner(model)
        state: DecoderState | None = self.decoder(inner).__dict__.pop("token_prune", None)
        if state is None:
            return
        for handle in state.handles:
            handle.remove()
        if state.short:
            inner.__dict__.pop("get_image_features", None)
        if state.tower:
            encoder = self.tower(inner)
            encoder_adapter(encoder).detach(encoder)
        if any(stage.where == "vision_tower" for stage in state.stages):
            for module in self.tower(inner).modules():
                if is_captured(module):  # of a block that the config may no longer name
                    disable_capture(module)
            detach_projector(inner.get_submodule(self.connector_name))
        for block in self.blocks(model):
            if isinstance(block, PrunedDecoderLayer):
                swap_class(block, block.stock_class)

    def states(self, model: PreTrainedModel) -> list[DecoderState]:
        """What the pruned language model knows; empty where it is dense."""
        state = self.decoder(self.inner(model)).__dict__.get("token_prune")
        return [] if state is None else [state]

    @contextmanager
    def recording(self, model: PreTrainedModel, recorder: Any) -> Iterator[None]:
        """Tell ``recorder`` what happens in the forwards inside a ``with`` block that have an image in them."""
        (state,) = self.states(model)
        if state.short:
            raise UnsupportedModelError(
                "with short prompts no token leaves in the decoder, so there is nothing to record: what "
                "get_image_features returns is what stays"
            )
        with ExitStack() as undo:
            hooks = self.tower(self.inner(model))._forward_hooks.values()
            for recorders in (state.recorders, *(hook.recorders for hook in hooks if isinstance(hook, Choice))):
                recorders.append(recorder)
                undo.callback(recorders.remove, recorder)
            if state.tower:
                encoder = self.tower(self.inner(model))
                of_tower = recorder.of_tower(len(tower_blocks(encoder)))
                undo.enter_context(encoder_adapter(encoder).recording(encoder, of_tower))
            yield
