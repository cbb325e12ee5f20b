"""Public checkpoints in and out, and our own models, which are written the same way: hub/ has the code.

    model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.bfloat16, device="cuda")
    save(model, tokenizer, "out/mine")             # transformers and vLLM read out/mine
"""

from hub.checkpoint import load, save

__all__ = ["load", "save"]
