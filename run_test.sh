#!/usr/bin/env bash
# Sample and score: bash run_test.sh [test_args/X.txt] [flags...]
# Without a file: test_args/fashion_mnist_dit.txt. Later flags win. Relative paths in flags start at the repository.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
start test "$@"
