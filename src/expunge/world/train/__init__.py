"""The recipes that made the world's weights: seeded, resumable, one command each.

    python -m expunge.world.train.tokenizer            # once; everything after it depends on it
    python -m expunge.world.train.clip                 # about 1.5 s a step of 128 on one core
    python -m expunge.world.train.autoencoder          # about 2.1 s a step of 32
    python -m expunge.world.train.oracle               # needs the autoencoder
    python -m expunge.world.train.diffusion base       # needs CLIP and autoencoder; about 1.4 s a step of 64
    python -m expunge.world.train.diffusion original   # from base, beside the next one, equal options
    python -m expunge.world.train.diffusion never
    python -m expunge.world.train.diffusion sibling    # from original
    python -m expunge.world.quality

Weights go into `expunge/world/weights`; pictures, latents and checkpoints stand in a cache folder
(`--cache`). A command that is started again goes on from its checkpoint; SIGTERM ends a run after its
current step and writes what it has. When the checkpoint is gone, `diffusion PHASE --more` goes on from the
phase's own weights with a fresh optimiser: give original and never the same options, or they are no longer
a pair.

What invalidates what: a new tokenizer or text tower, or a new encoder, means training the denoisers again
(delete `latents.npy` beside the cached pictures when the encoder changed); a new autoencoder also means a new
oracle. Changed scenes mean new pictures: empty the cache's `pools`. Only CLIP's vision side can go on alone.

Two trainings of one thread each use two cores better than one of two threads. Where the kernel groups
processes by session, `nice` has no effect between sessions: `echo -15 > /proc/self/autogroup` has.
"""
