"""The recipes that made the world's weights: seeded, resumable, one command each.

    python -m expunge.world.train.tokenizer            # once; everything after it depends on it
    python -m expunge.world.train.clip --bfloat16      # about 1.0 s a step of 128 on one core
    python -m expunge.world.train.autoencoder --bfloat16                # about 1.5 s a step of 32
    python -m expunge.world.train.oracle --bfloat16    # needs the autoencoder; 0.2 s a step of 128
    python -m expunge.world.train.diffusion base --bfloat16             # needs CLIP and autoencoder; 0.9 s a step
    python -m expunge.world.train.diffusion original --bfloat16 --decay 0.6     # from base, beside the next one,
    python -m expunge.world.train.diffusion never --bfloat16 --decay 0.6        # equal options
    python -m expunge.world.train.diffusion sibling --bfloat16 --decay 0.8      # from original
    python -m expunge.world.quality

What is shipped: CLIP 600 steps, 1,150 with readouts and then its vision side alone; autoencoder 1,118 + more and
950 steps; oracle 3,400 steps on 60,000 pictures; base 1,327 steps, original and never 2,600 each (seed 2), sibling
420 at a rate of 5e-4 (seed 3); `training.json` beside each denoiser says the rest.

Weights go into `expunge/world/weights`; pictures, latents and checkpoints stand in a cache folder
(`--cache`). A command that is started again goes on from its checkpoint; SIGTERM ends a run after its
current step and writes what it has. When the checkpoint is gone, `diffusion PHASE --more` goes on from the
phase's own weights with a fresh optimiser: give original and never the same options, or they are no longer
a pair.

What invalidates what: a new tokenizer or text tower, or a new encoder, means training the denoisers again
(delete `latents.npy` beside the cached pictures when the encoder changed); a new autoencoder also means a new
oracle. Changed scenes mean new pictures: empty the cache's `pools`. Only CLIP's vision side can go on alone
(`clip --more --no-resume --freeze-text`).

Two trainings of one thread each use two cores better than one of two threads. Where the kernel groups
processes by session, `nice` has no effect between sessions: `echo -15 > /proc/self/autogroup` has.
"""
