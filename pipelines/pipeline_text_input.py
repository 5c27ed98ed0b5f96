"""What the pipelines with a text share: encoding prompts for the transformer's cross-attention."""

from typing import Any

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)

# B pictures in the batch, L text tokens

# What `encode_prompt` returns, and a callback may change.
PROMPT_CONDITIONS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


class LocalDiTTextInputMixin:
    """From prompts to what the transformer reads."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ):
        """Encode texts into what the transformer's cross-attention reads.

        Args:
            prompt: one text or a list of B.
            negative_prompt: what guidance steers away from; None for the empty text.
            do_classifier_free_guidance: whether to encode the negative prompt at all.
            num_images_per_prompt: pictures per text; every row is repeated so often.
            device: where to; None for the pipeline's device.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask: what was
                encoded before, [B, L, caption_channels] and [B, L]; used instead of encoding.
            max_sequence_length: L; None for the folder's default. A text beside embeddings is encoded to their L.

        Returns:
            prompt_embeds [B * num_images_per_prompt, L, caption_channels], prompt_attention_mask [..., L] and the
            same two for the negative prompt (None without guidance).
        """
        device = device or self._execution_device
        length: int = self.call_default("max_sequence_length", max_sequence_length)
        if negative_prompt_embeds is not None and do_classifier_free_guidance:
            length = negative_prompt_embeds.shape[1]
        if prompt_embeds is None or prompt_attention_mask is None:
            texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            prompt_embeds, prompt_attention_mask = self._encode_texts(texts, length, device)
        batch_size, tokens = prompt_embeds.shape[:2]
        dtype = self.transformer.dtype if self.transformer is not None else prompt_embeds.dtype
        prompt_embeds = _repeat_rows(prompt_embeds, num_images_per_prompt, device, dtype)
        prompt_attention_mask = _repeat_rows(prompt_attention_mask, num_images_per_prompt, device)

        if do_classifier_free_guidance:
            if negative_prompt_embeds is None or negative_prompt_attention_mask is None:
                texts = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
                texts = texts * batch_size if len(texts) == 1 else texts
                negative_prompt_embeds, negative_prompt_attention_mask = self._encode_texts(texts, tokens, device)
            negative_prompt_embeds = _repeat_rows(negative_prompt_embeds, num_images_per_prompt, device, dtype)
            negative_prompt_attention_mask = _repeat_rows(negative_prompt_attention_mask, num_images_per_prompt, device)
        else:
            negative_prompt_embeds = None
            negative_prompt_attention_mask = None
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def prompt_conditions(self, *arguments: Any) -> dict[str, torch.Tensor | None]:
        """What `encode_prompt` returns for its arguments, by name."""
        return dict(zip(PROMPT_CONDITIONS, self.encode_prompt(*arguments), strict=True))

    def _encode_texts(
        self, texts: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.text_encoder is None:
            raise ValueError(
                "This pipeline has no text_encoder to encode the (negative) prompt with; give both prompt_embeds and "
                "negative_prompt_embeds, or guidance_scale=1."
            )
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(
            distinct, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
        )
        lengths = [len(ids) for ids in self.tokenizer(distinct, verbose=False).input_ids]
        for text, length in zip(distinct, lengths, strict=True):
            if length > max_sequence_length:
                logger.warning(f"Only the first {max_sequence_length} of {length} tokens are used of {text!r}.")
        mask = tokens.attention_mask.to(device)
        states = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        places = torch.tensor([distinct.index(text) for text in texts], device=device)
        return states[places], mask[places]

    def transformer_conditions(self, conditions: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The conditions by the transformer's names; with guidance the negative ones come before the others."""
        embeds, mask = conditions["prompt_embeds"], conditions["prompt_attention_mask"]
        if self.do_classifier_free_guidance:
            embeds = torch.cat((conditions["negative_prompt_embeds"], embeds))
            mask = torch.cat((conditions["negative_prompt_attention_mask"], mask))
        # columns that no text keeps cost time and change nothing
        kept = mask.bool().any(dim=0).nonzero()
        length = _rounded_up(int(kept[-1]) + 1 if len(kept) else 1, mask.shape[1])
        return {"encoder_hidden_states": embeds[:, :length], "encoder_attention_mask": mask[:, :length]}


def _rounded_up(length: int, longest: int) -> int:
    """The next multiple of 8, so that a compiled transformer meets few different lengths, but at most `longest`."""
    return min(-(-length // 8) * 8, longest)


def _repeat_rows(
    rows: torch.Tensor, times: int, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return rows.to(device=device, dtype=dtype).repeat_interleave(times, dim=0)
