"""The Metal path: the kernels of metal/ as descriptors, their launch, and the operations made of them.

source       the text of metal/, with includes inlined, and its constants and structures
constants    the constants of metal/ as attributes
tuning       the table of choices that depend on the GPU: tiles, splits, chunks
kernel       a kernel as plain data; its launch just in time, ahead of time, or in emulation
formats      a weight's format as a Metal type
descriptors  from the specialization of each kernel to its descriptor
matmul, stats, compare, kl, translate   the operations, as `ops` calls them
cost         what the kernels multiply, read and write, as formulas
library      the kernels of the ahead-of-time library
"""
