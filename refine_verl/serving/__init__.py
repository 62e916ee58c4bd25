"""vLLM serves DeltaNet and Gated DeltaNet as runs save them: its plug-in, and what it can serve (docs/vllm.md).

vLLM is imported here and nowhere else, and only where vLLM itself has asked for it.
"""
