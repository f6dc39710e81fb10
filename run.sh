#!/usr/bin/env bash
# Train: bash run.sh [train_args/X.txt] [flags...]
# Without a file: train_args/fashion_mnist_dit.txt. Later flags win. Relative paths in flags start at the repository.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
start train "$@"
