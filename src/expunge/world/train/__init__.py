"""The recipes that made the world's weights: seeded, resumable, one command each.

`python -m expunge.world.train.tokenizer`, `.clip`, `.autoencoder`, `.oracle`, `.diffusion` write into
`expunge/world/weights`; what they need while they run (pictures, checkpoints) stands in a cache folder.
"""
