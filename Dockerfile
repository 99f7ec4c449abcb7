# titan_lite on GPU machines. Not built or run where this project is developed (no GPU, no container runtime there).
#
#   docker build -t titan_lite .
#   docker run --gpus all --ipc=host -v "$PWD/outputs:/titan_lite/outputs" titan_lite train_configs/debug.toml
#
# The torch wheel brings its own CUDA libraries; the host supplies the driver (NVIDIA Container Toolkit).
FROM python:3.11-slim

# torch.compile calls a C++ compiler.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*

WORKDIR /titan_lite
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# Dependencies first: they change seldom and are most of the image.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY titan_lite/__init__.py titan_lite/
RUN pip install --no-cache-dir -e ".[hf]" -c constraints.txt

COPY . .
# run_train.sh finds this installation by its metadata and uses it as it is. `exec` form: signals reach it.
ENTRYPOINT ["./run_train.sh"]
