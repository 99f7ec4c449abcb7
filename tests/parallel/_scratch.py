import traceback, torch
torch.cuda.device_count=lambda:0
from tests.parallel import twins
def many(tabs):
    out=[]
    for t in tabs:
        try: out.append(twins.steps(t))
        except Exception as e: out.append(f"{type(e).__name__}: {e} {traceback.format_exc()[-900:]}")
    return out
