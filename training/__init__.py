"""What trains a residual token, an ICO concept, AnyLogo's U-Net, a subject encoder and its router; two by nodes.

copies            `with_gradients`; private copies of a MODEL or CLIP, loaded and let go of again
text              a CLIP's encoding that autograd goes through, also of vectors in place of words
denoising         the denoising loss of a MODEL, of what it predicts or of v
images            pictures to latents
loop              the steps: progress, cancel, precision, loss map, resume
files             files that are written whole or not at all
averages          of weights over steps, and of gradients over processes
state             the file that a training by nodes goes on from
concept           an ICO concept's prompts, and what of the U-Net it tunes
concept_words     how many words those have, and as what they begin
regularisation    pictures of other things of the noun, which an ICO concept must not change
concept_run       its training
concept_files     the files that a concept is kept in, and which training they are of
low_rank          a change of weights as two thin matrices
symbiotic         AnyLogo's tuning: low-rank differences, semantic maps, and the two passes
frozen            what stays as it is in such trainings of real families: a checkpoint's parts and a vision model
anylogo           AnyLogo's tuning of them
encoder_file      the file that both stages of AnyStory's training write
subject_encoder   the first stage of AnyStory's training beside them
subject_router    the second stage, of its router
router            that stage's pass and loss, which the toy's goes by, too
samples           what trainings of real families read: folders and WebDataset shards
groups            samples of several subjects
accelerated       the steps of such a training, on one process or many
usual             what steps, sizes and rates are where an input is 0

A training is:

    with with_gradients():
        encoder, denoiser = TextEncoder(clip), Denoiser(model, dtype, checkpointing)
        with loaded(encoder.patcher, denoiser.patcher):
            groups = [Group(parameters, learning_rate)]
            training = Training(groups, device=denoiser.device, dtype=dtype, seed=seed, state=state)
            loss_map = training.run(steps, loss)
"""
