"""Files of weights of other programs, read without these programs and without running their code.

`files` opens any of them, `torch_files` and `graphs` read single formats, and `state_dicts` chooses
the weights among what a checkpoint holds.
"""
