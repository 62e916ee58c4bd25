"""vLLM serves DeltaNet and Gated DeltaNet as runs save them: its plug-in, what it can serve, and its engine asked for
answers and scores (docs/vllm.md).

vLLM is imported here and nowhere else, and only where vLLM itself or `engine=vllm` has asked for it.
"""
