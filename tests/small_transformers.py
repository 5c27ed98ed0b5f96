"""Small transformers, inputs for them, and the arithmetic that they are held to."""

import math

import torch

from localdit import LocalDiTTransformer2DModel

TEXT_WIDTH, LABELS = 20, 5
TEXT = {"caption_channels": TEXT_WIDTH}
CLASSES = {"caption_channels": None, "num_classes": LABELS}
UNCONDITIONAL = {"caption_channels": None}
SIZES = {"use_additional_conditions": True}
EVERY_PARAMETER = {"window": {"window_size": 3, "relative_position_bias": True, "global_context": 2}}
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def make_model(**changes) -> LocalDiTTransformer2DModel:
    """A tiny model in which no parameter has a value, such as 0 or 1, that could hide a mistake."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "sample_size": 16,
        "mixer_options": {"window": {"window_size": 3}},
    }
    model = LocalDiTTransformer2DModel(**{**config, **TEXT, **changes})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_inputs(model, batch_size=2, height=12, width=20, text_tokens=6, dtype=torch.float32) -> dict:
    """Random inputs of every kind that the model needs."""
    config = model.config
    inputs = {
        "hidden_states": torch.randn(batch_size, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.linspace(3, 981, batch_size).long(),
    }
    if config.caption_channels:
        inputs["encoder_hidden_states"] = torch.randn(batch_size, text_tokens, config.caption_channels, dtype=dtype)
        lengths = torch.arange(batch_size) % text_tokens + 1
        inputs["encoder_attention_mask"] = (torch.arange(text_tokens) < lengths[:, None]).long()
    if config.num_classes:
        inputs["class_labels"] = torch.arange(batch_size) * 2
    if model.use_additional_conditions:
        inputs["added_cond_kwargs"] = {
            "resolution": torch.tensor([[8.0 * height, 8.0 * width]] * batch_size, dtype=dtype),
            "aspect_ratio": torch.tensor([[width / height]] * batch_size, dtype=dtype),
        }
    return inputs


def call(model, **inputs) -> torch.Tensor:
    return model(**inputs).sample


class Reference:
    """The forward pass in plain steps, from the weights alone; all self-attention is window attention without extras.

    Steps 1 to 8 of LocalDiT as released (PixArt, arXiv 2310.00426, with windows, RoPE and RMSNorm), in fp64.
    """

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.heads, self.head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        self.width = self.heads * self.head_dim

    def linear(self, name, states):
        bias = self.weights.get(f"{name}.bias")
        product = states @ self.weights[f"{name}.weight"].T
        return product if bias is None else product + bias

    def layer_norm(self, states):
        mean = states.mean(-1, keepdim=True)
        return (states - mean) / ((states - mean).pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt()

    def gelu(self, states):
        return 0.5 * states * (1 + torch.tanh(math.sqrt(2 / math.pi) * (states + 0.044715 * states**3)))

    def silu(self, states):
        return states / (1 + torch.exp(-states))

    def sinusoid(self, numbers):
        # fp32 like the model's, for rounding at t = 1000 is no matter of correctness
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = numbers.flatten()[:, None].float() * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1).double()

    def embed(self, name, numbers):
        return self.linear(f"{name}.linear_2", self.silu(self.linear(f"{name}.linear_1", self.sinusoid(numbers))))

    def positions(self, rows, columns):
        """[N, C]: the first half of the channels from x, the second from y; each sines, then cosines."""
        base = self.config.sample_size // self.config.patch_size
        scale = self.config.interpolation_scale or max(self.config.sample_size // 64, 1)
        quarter = self.width // 4
        frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        table = torch.empty(rows, columns, self.width, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                x, y = j * base / columns / scale * frequencies, i * base / rows / scale * frequencies
                table[i, j] = torch.cat((x.sin(), x.cos(), y.sin(), y.cos()))
        return table.flatten(0, 1)

    def split_heads(self, name, states, norm=None):
        states = self.linear(name, states).unflatten(-1, (self.heads, self.head_dim))
        if norm is not None and self.config.qk_norm:
            states = states / (states.pow(2).mean(-1, keepdim=True) + self.config.qk_norm_eps).sqrt()
            states = states * self.weights[f"{norm}.weight"]
        return states.transpose(1, 2)  # [B, H, N, D]

    def attend(self, name, query, key, value, bias):
        scores = query @ key.mT / math.sqrt(self.head_dim) + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.linear(f"{name}.to_out.0", mixed)

    def rotate(self, states, rows, columns):
        """RoPE as multiplication by complex numbers: the first half of the pairs turns with x, the second with y."""
        count = self.head_dim // 4
        frequencies = self.config.rope_theta ** (-4 * torch.arange(count, dtype=torch.float64) / self.head_dim)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = torch.cat((x.flatten()[:, None] * frequencies, y.flatten()[:, None] * frequencies), dim=1)
        pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def window_attention(self, name, states, rows, columns, shift):
        window_size = self.config.mixer_options["window"]["window_size"]
        query = self.rotate(self.split_heads(f"{name}.to_q", states, f"{name}.norm_q"), rows, columns)
        key = self.rotate(self.split_heads(f"{name}.to_k", states, f"{name}.norm_k"), rows, columns)
        value = self.split_heads(f"{name}.to_v", states)
        window = torch.tensor(
            [
                [(i - shift) // window_size, (j - shift) // window_size]  # Python's // rounds down
                for i in range(rows)
                for j in range(columns)
            ]
        )
        same = (window[:, None] == window[None]).all(-1)
        return self.attend(name, query, key, value, torch.zeros(same.shape).masked_fill(~same, float("-inf")))

    def cross_attention(self, name, states, text, mask):
        query = self.split_heads(f"{name}.to_q", states, f"{name}.norm_q")
        key = self.split_heads(f"{name}.to_k", text, f"{name}.norm_k")
        value = self.split_heads(f"{name}.to_v", text)
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))
        return self.attend(name, query, key, value, bias[:, None, None])

    def block(self, index, states, modulation, rows, columns, text, mask):
        name = f"transformer_blocks.{index}"
        modulation = self.weights[f"{name}.scale_shift_table"] + modulation  # [B, 6, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, i : i + 1] for i in range(6))

        normed = self.layer_norm(states) * (1 + scale1) + shift1
        window_shift = (self.config.mixer_options["window"]["window_size"] // 2) * (index % 2)
        mixed = self.window_attention(f"{name}.attn", normed, rows, columns, window_shift)
        states = states + gate1 * (mixed + normed if self.config.attention_residual else mixed)
        if text is not None:
            states = states + self.cross_attention(f"{name}.cross_attn", states, text, mask)
        normed = self.layer_norm(states) * (1 + scale2) + shift2
        hidden = self.gelu(self.linear(f"{name}.ff.net.0.proj", normed))
        return states + gate2 * self.linear(f"{name}.ff.net.2", hidden)

    def __call__(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        batch_size, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        patches = hidden_states.double().reshape(batch_size, channels, rows, patch, columns, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows * columns, -1)
        states = patches @ self.weights["pos_embed.proj.weight"].flatten(1).T + self.weights["pos_embed.proj.bias"]
        states = states + self.positions(rows, columns)

        condition = self.embed("adaln_single.emb.timestep_embedder", timestep)
        if added_cond_kwargs is not None:
            tall, wide = added_cond_kwargs["resolution"].T
            sizes = [self.embed("adaln_single.emb.resolution_embedder", side) for side in (tall, wide)]
            ratio = self.embed("adaln_single.emb.aspect_ratio_embedder", added_cond_kwargs["aspect_ratio"])
            condition = condition + torch.cat((*sizes, ratio), dim=1)
        if class_labels is not None:
            condition = condition + self.weights["class_embedder.weight"][class_labels]
        modulation = self.linear("adaln_single.linear", self.silu(condition)).reshape(batch_size, 6, -1)

        text = None
        if encoder_hidden_states is not None:
            hidden = self.gelu(self.linear("caption_projection.linear_1", encoder_hidden_states.double()))
            text = self.linear("caption_projection.linear_2", hidden)
        for index in range(self.config.num_layers):
            states = self.block(index, states, modulation, rows, columns, text, encoder_attention_mask)

        table = self.weights["scale_shift_table"]
        states = self.layer_norm(states) * (1 + (table[1] + condition)[:, None]) + (table[0] + condition)[:, None]
        patches = self.linear("proj_out", states).reshape(batch_size, rows, columns, patch, patch, -1)
        sample = torch.empty(batch_size, patches.shape[-1], height, width, dtype=torch.float64)
        for i in range(patch):
            for j in range(patch):
                sample[:, :, i::patch, j::patch] = patches[:, :, :, i, j].permute(0, 3, 1, 2)
        return sample


def mixers_of(model):
    return [block.attn.get_processor() for block in model.transformer_blocks]
