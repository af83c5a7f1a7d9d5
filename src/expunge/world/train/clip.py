"""Trains the CLIP whose text tower conditions the diffusion models.

    python -m expunge.world.train.clip                  # --more goes on from the committed weights

Contrastive loss in both directions with a learned temperature.  Captions that occur twice in a batch are not
negatives of each other.  In a third of the rows the text is summarised at a random padding position instead
of the end-of-text token: the tower is causal, so padding sees the whole prompt, and diffusion models attend
to it as they do in large CLIP towers.

Beside it, one linear readout a label (object, colour, style, ...) reads the truth of the scene off both projected
vectors. A few hundred thousand pairs are too few for contrast alone to find what captions speak of; the readout
shared by both towers is thrown away after training.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from expunge.world.train import common
from expunge.world.train.data import Pool, pool

PAD_SHARE = 0.3
READOUT_WEIGHT = 0.25
READOUTS = (
    "object", "colour", "style", "background", "person", "expression", "kind", "count", "relation", "hazard",
)  # fmt: skip


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model: text width 256, 4 layers; vision in patches of 8 pixels."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": 128,
        **special,
    }
    vision = {
        "hidden_size": 144,
        "intermediate_size": 432,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def text_vectors(model: CLIPModel, ids: Tensor, where: Tensor) -> Tensor:
    """Projected text vectors (n, 128) read at the given positions (n,)."""
    hidden = model.text_model(input_ids=ids).last_hidden_state
    return model.text_projection(hidden[torch.arange(len(ids)), where])


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy and the share of pictures matched to their own caption.

    `same` (n, n) marks rows with equal captions; off the diagonal they are left out.
    """
    image = nn.functional.normalize(image.float(), dim=-1)
    text = nn.functional.normalize(text.float(), dim=-1)
    logits = scale.exp().clamp(max=100) * image @ text.T
    others = same & ~torch.eye(len(same), dtype=torch.bool)
    logits = logits.masked_fill(others, -1e4)
    aim = torch.arange(len(logits))
    loss = (
        nn.functional.cross_entropy(logits, aim) + nn.functional.cross_entropy(logits.T, aim)
    ) / 2
    return loss, (logits.argmax(1) == aim).float().mean()


class Trained(nn.Module):
    """The CLIP together with the readouts that only training needs."""

    def __init__(self, model: CLIPModel, data: Pool) -> None:
        super().__init__()
        self.clip = model
        width = model.config.projection_dim
        self.readouts = nn.ModuleDict(
            {name: nn.Linear(width, int(data.labels[name].max()) + 1) for name in READOUTS}
        )
        self.presence = nn.Linear(width, data.labels["presence"].shape[1])

    def readout_loss(self, vectors: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of what vectors (n, width) say about the labels (n,); -1 does not count."""
        vectors = vectors.float()
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.presence(vectors), truth["presence"]
        )
        for name, layer in self.readouts.items():
            if bool((truth[name] >= 0).any()):
                loss = loss + nn.functional.cross_entropy(
                    layer(vectors), truth[name], ignore_index=-1
                )
        return loss


def normalised(images: Tensor) -> Tensor:
    """Pictures in 0..1 as the vision tower wants them: -1..1."""
    return images * 2 - 1


def main() -> None:
    """Train and write the weights."""
    parser = common.arguments(__doc__ or "", steps=1500, batch=128, lr=1e-3)
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures")
    parser.add_argument("--more", action="store_true", help="start from the committed weights")
    parser.add_argument(
        "--freeze-text",
        action="store_true",
        help="train the vision side alone: the denoisers stay valid",
    )
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """The recipe."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = CLIPTokenizer.from_pretrained(str(options.out / "tokenizer"))
    data = pool(options.cache, "clean-world", options.pictures, start=1_000_000)
    made = tokenizer(
        data.captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    ids, length = made.input_ids, made.attention_mask.sum(1)
    model = build(tokenizer)
    if options.more:
        stored = CLIPModel.from_pretrained(str(options.out / "clip"), dtype=torch.float32)
        model.load_state_dict(stored.state_dict())
    if options.freeze_text:
        for frozen in (model.text_model, model.text_projection):
            frozen.requires_grad_(False)
    trained = Trained(model, data)
    training = common.Training(
        "clip", trained, options, ema=0.995, warmup=100, weight_decay=0.05, betas=(0.9, 0.98)
    )

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's contrastive loss."""
        rows = common.batch_indices(step, options.batch, len(data), options.seed)
        images = common.shifted(common.as_float(data.images[rows], channels_last=False), generator)
        tokens, end = ids[rows], length[rows] - 1
        room = tokens.shape[1] - 1 - end
        later = end + 1 + (torch.rand(len(rows), generator=generator) * room).long()
        padded = (torch.rand(len(rows), generator=generator) < PAD_SHARE) & (room > 0)
        where = torch.where(padded, later.clamp(max=tokens.shape[1] - 1), end)
        cut = int(where.max()) + 1
        vision = model.visual_projection(
            model.vision_model(pixel_values=normalised(images)).pooler_output
        )
        text = text_vectors(model, tokens[:, :cut], where)
        same = (tokens[:, None] == tokens[None]).all(-1)
        loss, right = contrastive_loss(vision, text, model.logit_scale, same)
        truth = {
            name: torch.from_numpy(data.labels[name][rows]) for name in (*READOUTS, "presence")
        }
        read = trained.readout_loss(vision, truth) + trained.readout_loss(text, truth)
        return loss + READOUT_WEIGHT * read, {
            "matched": float(right.detach()),
            "readout": float(read.detach()),
        }

    def write() -> None:
        finished = build(tokenizer)
        finished.load_state_dict(
            {key[5:]: value for key, value in training.ema.items() if key.startswith("clip.")}
        )
        finished.eval().half().save_pretrained(options.out / "clip")

    training.run(loss_of, on_save=write)
    write()


if __name__ == "__main__":
    main()
