"""What the LocalDiT pipelines share: defaults, noise and timesteps, the denoising loop, the VAE."""

import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import retrieve_timesteps
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import retrieve_latents
from diffusers.utils import is_torch_xla_available, logging
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode

xla = importlib.import_module("torch_xla.core.xla_model") if is_torch_xla_available() else None
logger = logging.get_logger(__name__)

Setting = TypeVar("Setting")

# B pictures in the batch, C and D channels, H and W of the latents

# What a call uses where neither the caller nor the folder's `call_defaults` says otherwise.
STANDARD_CALL = {
    "height": None,
    "width": None,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "img2img_guidance_scale": None,  # as guidance_scale
    "strength": 0.6,
    "max_sequence_length": 120,
    "aspect_ratio": "height/width",
}

ASPECT_RATIOS = ("height/width", "width/height")  # PixArt's, and the released LocalDiT's

# Of a picture that goes through the VAE in tiles.
LARGEST_WHOLE = 1.5  # tiles; a picture of more pixels is cut
SMALLEST_TILE = 16  # latents along its side
OVERLAP = 1 / 4  # of a tile's side
DISCARDED = 1 / 4  # of an overlap, next to each cut, where convolutions pad what goes on in the picture


def checked_call_defaults(call_defaults: dict[str, Any] | None) -> dict[str, Any]:
    """Return `call_defaults`, or raise a ValueError that names what it may not hold."""
    if not isinstance(call_defaults, dict | None):
        raise ValueError(f"call_defaults={call_defaults!r} is no dict; it may hold {sorted(STANDARD_CALL)}.")
    call_defaults = dict(call_defaults or {})
    unknown = sorted(set(call_defaults) - set(STANDARD_CALL))
    if unknown:
        raise ValueError(f"call_defaults has unknown key(s) {unknown}; it may hold {sorted(STANDARD_CALL)}.")
    aspect_ratio = call_defaults.get("aspect_ratio", STANDARD_CALL["aspect_ratio"])
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"call_defaults has aspect_ratio={aspect_ratio!r}; choose among {list(ASPECT_RATIOS)}.")
    return call_defaults


def check_widths(transformer, text_encoder, vae) -> None:
    """Raise a ValueError where the components were made for other models."""
    if transformer is None:
        return
    if text_encoder is not None and text_encoder.config.hidden_size != transformer.config.caption_channels:
        raise ValueError(
            f"The text encoder's states are {text_encoder.config.hidden_size} wide, but the transformer was made for "
            f"caption_channels={transformer.config.caption_channels}; use the text encoder it was trained with."
        )
    if vae is not None and vae.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"The VAE's latents have {vae.config.latent_channels} channels, but the transformer was made for "
            f"in_channels={transformer.config.in_channels}; use the VAE it was trained with."
        )


class LocalDiTPipelineMixin:
    """The parts of a call that all LocalDiT pipelines have in common; the pipeline class brings the components."""

    _vae_tile_size: int | None = 1024

    def initialize(self, call_defaults: dict[str, Any] | None) -> None:
        """Derive from the registered components what every call needs, and register the call defaults."""
        self.register_to_config(call_defaults=checked_call_defaults(call_defaults))
        self._interrupt = False
        vae = getattr(self, "vae", None)
        check_widths(self.transformer, getattr(self, "text_encoder", None), vae)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        # it would pass tensors of so many channels on as latents; those never get to it
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, vae_latent_channels=0)

    def begin(self, guidance_scale: float, attention_kwargs: dict[str, Any] | None) -> torch.device:
        """Note what a call's properties tell from now on; returns the device that it runs on."""
        if not isinstance(attention_kwargs, dict | None):
            raise TypeError(f"attention_kwargs={attention_kwargs!r} is no dict; give one, such as {{'scale': 0.5}}.")
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        return self._execution_device

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that the sampler starts from."""
        return getattr(self.scheduler, "init_noise_sigma", 1.0)

    def call_default(self, name: str, value: Setting | None) -> Setting:
        """`value`, or where that is None the folder's default of that name, or else the library's."""
        if value is not None:
            return value
        return self.config.call_defaults.get(name, STANDARD_CALL[name])

    def default_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, by default the size the transformer was made for."""
        side = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = self.call_default("height", height), self.call_default("width", width)
        return side if height is None else height, side if width is None else width

    def prepare_noise(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Standard normal latents [B, C, H, W] for pictures of so many pixels.

        One generator is asked for one picture after the other, so a seed gives the same first picture whatever the
        batch size.
        """
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if isinstance(generator, torch.Generator):
            generator = [generator] * batch_size
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def set_timesteps(
        self,
        num_inference_steps: int,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        height: int,
        width: int,
        device: torch.device,
    ) -> tuple[torch.Tensor, int]:
        """Set the scheduler's timesteps (shifted by the number of tokens where it asks for that)."""
        shift = {}
        if self.scheduler.config.get("use_dynamic_shifting", False):
            tokens = height * width // (self.vae_scale_factor * self.transformer.config.patch_size) ** 2
            curve = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
            shift["mu"] = calculate_shift(tokens, *(self.scheduler.config.get(*item) for item in curve.items()))
        schedule = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas, **shift)
        return cast(tuple[torch.Tensor, int], schedule)

    def size_conditions(self, height: int, width: int) -> dict[str, torch.Tensor] | None:
        """Resolution [1, 2] in pixels and aspect ratio [1, 1], for a transformer that was trained with them.

        One row for all pictures, as caches such as FasterCache run the transformer on parts of a batch.
        """
        if not self.transformer.use_additional_conditions:
            return None
        like = {"dtype": self.transformer.dtype, "device": self._execution_device}
        upright = self.call_default("aspect_ratio", None) == "height/width"
        aspect_ratio = height / width if upright else width / height
        return {
            "resolution": torch.tensor([[height, width]], **like),
            "aspect_ratio": torch.tensor([[aspect_ratio]], **like),
        }

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, Any],
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: Iterable[str],
        after_step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the sampler over `timesteps`; `conditions` maps names to tensors, which a callback may change.

        `after_step` changes the latents after each step, given them and the timesteps that are left.
        """
        step_arguments = _supported(self.scheduler.step, generator=generator, eta=eta)
        warmup_steps = max(len(timesteps) - self._num_timesteps * self.scheduler.order, 0)
        inputs = self.transformer_conditions(conditions)
        with self.transformer.keep_text_states(), self.progress_bar(total=self._num_timesteps) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                prediction = self.predict(latents, timestep, inputs, height, width)
                latents = self.scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
                if after_step is not None:
                    latents = after_step(latents, timesteps[index + 1 :])
                if callback_on_step_end is not None:
                    state = {"latents": latents, **conditions}
                    chosen = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, index, timestep, chosen) or {}
                    latents = changed.pop("latents", latents)
                    conditions = {**conditions, **{name: changed[name] for name in conditions if name in changed}}
                    inputs = self.transformer_conditions(conditions)  # anew: it may have changed the weights, too
                last = index == len(timesteps) - 1
                if last or (index + 1 > warmup_steps and (index + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                if xla is not None:
                    xla.mark_step()
        self._current_timestep = None
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"The latents are NaN or infinite after sampling with {type(self.scheduler).__name__} in "
                f"{latents.dtype}; sample in torch.float32 or torch.bfloat16, or load weights that are not damaged."
            )
        return latents

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        height: int,
        width: int,
    ) -> torch.Tensor:
        """The guided prediction for one step, [B, C, H, W], in the form the scheduler expects.

        `inputs` are what `transformer_conditions` returns.
        """
        guided = self.do_classifier_free_guidance
        model_input = torch.cat((latents, latents)) if guided else latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(model_input, timestep)
        with self.transformer.cache_context("cond_uncond"):
            prediction = self.transformer(
                model_input.to(self.transformer.dtype),
                **inputs,
                timestep=timestep.expand(len(model_input)),
                added_cond_kwargs=self.size_conditions(height, width),
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )[0]
        if self.transformer.out_channels == 2 * self.transformer.config.in_channels:
            prediction = prediction.chunk(2, dim=1)[0]  # the other half is a learned variance, which samplers ignore
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
        return sample_to_velocity(prediction, latents, timestep, self.scheduler)

    def decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Turn latents into pictures of the asked type (or leave them for "latent")."""
        if output_type == "latent":
            return latents
        if self.vae is not None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
            latents = self.vae_decode(latents.to(self.vae.dtype))
        return self.image_processor.postprocess(latents, output_type=output_type)

    @property
    def vae_tile_size(self) -> int | None:
        """Pixels along one side of a tile, 1024 unless set; None leaves every picture whole.

        A picture of more than 1.5 times its square goes through an AutoencoderKL in tiles, so that the memory it takes
        is that of one tile and of the picture itself. Where the VAE's own tiling is enabled, that is used instead.

        Raises:
            ValueError: when set to less than 16 latents, or to what is no whole number.
        """
        return self._vae_tile_size

    @vae_tile_size.setter
    def vae_tile_size(self, pixels: int | None) -> None:
        smallest = SMALLEST_TILE * self.vae_scale_factor
        whole = isinstance(pixels, Integral) and not isinstance(pixels, bool)
        if pixels is not None and (not whole or pixels < smallest):
            raise ValueError(
                f"vae_tile_size={pixels!r} is no whole number of at least {smallest} pixels; "
                "give one, or None to leave every picture whole."
            )
        self._vae_tile_size = pixels

    def is_cut(self, height: int, width: int) -> bool:
        """Whether a picture of so many pixels goes through the VAE in tiles."""
        if self.vae_tile_size is None or not isinstance(self.vae, AutoencoderKL) or self.vae.use_tiling:
            return False
        return height * width > LARGEST_WHOLE * self.vae_tile_size**2

    def vae_decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's pictures, about in [-1, 1], of latents [B, C, H, W] in its own scale."""

        def decode(part: torch.Tensor) -> torch.Tensor:
            return self.vae.decode(part, return_dict=False)[0]

        tile, zoom = self.vae_tile_size, self.vae_scale_factor
        if tile is None or not self.is_cut(*(zoom * side for side in latents.shape[-2:])):
            return decode(latents)
        return in_tiles(decode, latents, tile // zoom, zoom_in=1, zoom_out=zoom)

    def vae_encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The VAE's latents in its own scale, the mode of its posterior, of pictures in [-1, 1]."""

        def encode(part: torch.Tensor) -> torch.Tensor:
            return retrieve_latents(self.vae.encode(part), sample_mode="argmax")

        tile, zoom = self.vae_tile_size, self.vae_scale_factor
        if tile is None or not self.is_cut(*pixels.shape[-2:]):
            return encode(pixels)
        return in_tiles(encode, pixels, tile // zoom, zoom_in=zoom, zoom_out=1)


def in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, tile: int, zoom_in: int, zoom_out: int
) -> torch.Tensor:
    """What a VAE's encoder or decoder makes of `inputs`, tile by tile.

    Tiles overlap and fade into each other. Group norms would give each a tone of its own; so all take the statistics
    of the whole picture shrunk to one tile, as the "Tiled VAE" of
    https://github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111 does.

    Args:
        function: from [B, C, h * zoom_in, w * zoom_in] to [B, D, h * zoom_out, w * zoom_out].
        inputs: [B, C, H * zoom_in, W * zoom_in].
        tile: the most latents along a tile's side.
        zoom_in, zoom_out: numbers along a latent's side.

    Returns:
        [B, D, H * zoom_out, W * zoom_out] in fp32.
    """
    rows, columns = (spans(side // zoom_in, tile) for side in inputs.shape[-2:])
    with SharedGroupNorms() as norms:
        channels = function(shrunk(inputs, tile, zoom_in)).shape[1]
        sides = (zoom_out * rows[-1][1], zoom_out * columns[-1][1])
        outputs = torch.zeros(len(inputs), channels, *sides, device=inputs.device)
        for (top, bottom), row_weights in zip(rows, fades(rows, zoom_out), strict=True):
            for (left, right), column_weights in zip(columns, fades(columns, zoom_out), strict=True):
                norms.begin_pass()
                part = function(inputs[..., zoom_in * top : zoom_in * bottom, zoom_in * left : zoom_in * right])
                place = outputs[..., zoom_out * top : zoom_out * bottom, zoom_out * left : zoom_out * right]
                place += part * (row_weights[:, None] * column_weights).to(part.device)
    return outputs


def spans(length: int, tile: int) -> list[tuple[int, int]]:
    """Starts and ends of the fewest equal tiles that cover a length, each overlapping the next by `OVERLAP` or more."""
    overlap = int(tile * OVERLAP)
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    tile = min(length, math.ceil((length + (count - 1) * overlap) / count))
    starts = [index * (length - tile) // max(count - 1, 1) for index in range(count)]
    return [(start, start + tile) for start in starts]


def fades(tiles: list[tuple[int, int]], zoom: int) -> list[torch.Tensor]:
    """Weights of the outputs along each tile; those of all tiles add up to 1 everywhere."""
    weights = [torch.ones(zoom * (stop - start)) for start, stop in tiles]
    for index, ((_, stop), (start, _)) in enumerate(itertools.pairwise(tiles)):
        overlap = zoom * (stop - start)
        across = (torch.arange(overlap) + 0.5) / overlap
        rise = ((across - DISCARDED) / (1 - 2 * DISCARDED)).clamp(0, 1)
        weights[index][-overlap:] = 1 - rise
        weights[index + 1][:overlap] = rise
    return weights


def shrunk(inputs: torch.Tensor, tile: int, zoom: int) -> torch.Tensor:
    """The inputs [B, C, H * zoom, W * zoom] as one tile of the same proportions, mean and deviation."""
    height, width = inputs.shape[-2:]
    share = tile * zoom / math.sqrt(height * width)
    size = [zoom * max(1, int(side / zoom * share)) for side in (height, width)]
    large = inputs.float()
    small = F.interpolate(large, size=size, mode="bilinear", antialias=True)
    (deviation, mean), (own_deviation, own_mean) = (
        torch.std_mean(numbers, dim=(2, 3), correction=0, keepdim=True) for numbers in (large, small)
    )
    # shrinking smoothes, and what varies less would be amplified by every group norm that follows
    return ((small - own_mean) * (deviation / own_deviation.clamp(min=1e-6)) + mean).to(inputs.dtype)


class SharedGroupNorms(TorchFunctionMode):
    """Inside, the group norms of the first pass measure, and those of later passes use what was measured.

    A pass is one run of the network, and a norm is known by its place in it. The network stays as it is.
    """

    def __init__(self):
        super().__init__()
        self.measured: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.place: int | None = None  # of the next norm; None while measuring

    def begin_pass(self) -> None:
        """Start a pass that uses what the first one measured."""
        self.place = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.group_norm:
            return self.normalize(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def normalize(
        self,
        input: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """`torch.nn.functional.group_norm` of [B, C, ...] with its arguments."""
        if self.place is None:
            groups = input.unflatten(1, (num_groups, -1)).flatten(2).float()  # [B, groups, numbers of a group]
            self.measured.append(torch.var_mean(groups, dim=2, correction=0))
            return F.group_norm(input, num_groups, weight, bias, eps)
        # a batch norm with B * C channels is an affine map by given statistics, and computes it in fp32
        batch_size, channels = input.shape[:2]
        statistics = (each.repeat_interleave(channels // num_groups, dim=1) for each in self.measured[self.place])
        variance, mean = (each.flatten().to(input.device) for each in statistics)
        weight, bias = (None if each is None else each.float().repeat(batch_size) for each in (weight, bias))
        self.place += 1
        return F.batch_norm(input.flatten(0, 1)[None], mean, variance, weight, bias, eps=eps)[0].view_as(input)


def sample_to_velocity(
    prediction: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor, scheduler
) -> torch.Tensor:
    """Turn a predicted clean picture into the velocity that flow-matching schedulers integrate.

    They have no setting for it, unlike `DPMSolverMultistepScheduler`, but keep the `prediction_type` of the config they
    were made from. With x_t = (1 - s) x_0 + s e the velocity is e - x_0 = (x_t - x_0) / s, where s = timestep / 1000.
    """
    flow_matching = hasattr(scheduler, "scale_noise")
    if not flow_matching or scheduler.config.get("prediction_type") != "sample":
        return prediction
    sigma = timestep / scheduler.config.num_train_timesteps
    return (latents - prediction) / sigma


def _supported(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that `function` takes (schedulers differ)."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}
