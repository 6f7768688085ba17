"""The Metal path: kernels of metal/ as descriptors, their launch, and the operations made of them.

source       the text of metal/, its includes inlined
kernel       a kernel as plain data; launched just in time or ahead of time
formats      a weight's format as a Metal type
descriptors  what each kernel is specialized for -> descriptor
tuning       tiles, splits, chunks: the table that depends on the GPU
tensor       the M5's matrix units
stats, kl, translate   the operations, as `ops` calls them
library      every instantiation of the ahead-of-time library
"""
