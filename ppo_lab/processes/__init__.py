"""The processes of a run: one by default, several where torchrun or accelerate launch starts them.

Nobody else imports accelerate or torch.distributed. The experiment does not change with their
number: samples are shared out, what is made of them is gathered, and gradients are summed.
"""
