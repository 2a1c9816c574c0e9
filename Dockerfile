# The kit with every package it needs. Build and run: docker/README.md.
# The digest is quoted from public projects that pin the same tag; it was not checked.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-runtime-ubuntu24.04@sha256:76f46f3e649824ebd3685d3d86c42b0ea62af04f59242f419f56cd5804a72efb
FROM ${BASE_IMAGE}

# tini: a Python as process 1 would ignore `docker stop` and leave the sandbox's orphans as zombies. bubblewrap: for
# kernels that let it make what they refuse to the sandbox (docs/sandbox.md). gcc and the headers of C and of Python:
# Triton builds its launchers with them.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv python3-dev \
    gcc libc6-dev tini bubblewrap \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home --home-dir /tmp treediff \
 && install -d -o 10001 -g 10001 /out

# The packages: a layer that only a new lock makes anew. The constraints pin what builds the few source packages, too.
ARG LOCK=docker/cuda.lock
COPY ${LOCK} /app/lock
RUN python3 -m venv /app/venv \
 && PIP_CONSTRAINT=/app/lock PIP_BUILD_CONSTRAINT=/app/lock \
    /app/venv/bin/pip install --no-cache-dir --use-pep517 -r /app/lock

COPY pyproject.toml README.md LICENSE /app/src/
COPY treediff /app/src/treediff
RUN /app/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --no-index /app/src
COPY notebooks /app/notebooks
COPY docker/entrypoint /app/entrypoint

# The root may be read-only: what must last goes to /out, the rest to /tmp. USER is for callers of getpass.getuser()
# under a --user that the image does not know.
ARG TREEDIFF_COMMIT=
ENV PATH=/app/venv/bin:$PATH \
    TREEDIFF_COMMIT=$TREEDIFF_COMMIT TREEDIFF_NOTEBOOKS=/app/notebooks TREEDIFF_RUNS=/out/runs \
    XDG_CACHE_HOME=/out/cache HF_HOME=/out/cache/huggingface \
    HOME=/tmp USER=treediff JUPYTER_DATA_DIR=/tmp/jupyter JUPYTER_CONFIG_DIR=/tmp/jupyter/config \
    JUPYTER_RUNTIME_DIR=/tmp/jupyter/runtime IPYTHONDIR=/tmp/ipython MPLCONFIGDIR=/tmp/matplotlib \
    TRITON_CACHE_DIR=/tmp/triton PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
VOLUME /out
USER 10001:10001
ENTRYPOINT ["tini", "-g", "--", "/app/entrypoint"]
CMD ["reproduce"]
