"""Where a run goes wrong: the first tensor that is not finite."""
import torch, torch.nn as nn
import launch

def first_not_finite(model, batches):
    """Passes over [(tokens, targets), ...] of train_gpt.GPT -> the name of the first tensor not finite.

    In order of computing: a layer's weight, input, output; the loss; the gradient dy of a layer's output. Of
    several processes that of the first, by rank, which has found one; all wait for it.
    """
    found = []
    def see(name, *values):
        if not all(v.isfinite().all() for v in values): found.append(name)
    def hook(name, m, inputs, y):
        for what, values in dict(weight=[*m.parameters()], input=inputs, output=[y]).items():
            see(f"the {what} of {name}", *values)
        y.register_hook(lambda dy: see(f"the gradient dy of {name}", dy))
    for name, m in model.named_modules():
        if isinstance(m, (nn.Linear, nn.Embedding, nn.RMSNorm)):
            m.register_forward_hook(lambda *args, name=name: hook(name, *args))
    with torch.compiler.set_stance("force_eager"):
        for tokens, targets in batches:
            loss = model(tokens, targets)
            see("the loss", loss)
            loss.backward()
    nothing = "nothing any more, or only the norm of all"
    return next((names[0] for names in launch.gather(found) if names), nothing)
