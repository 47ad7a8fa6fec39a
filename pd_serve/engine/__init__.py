"""What both kinds of node run on a device: sequences, scheduler, batches, model runner, sampler."""
