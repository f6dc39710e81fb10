#!/usr/bin/env bash
# Sample and score: bash run_test.sh [test_args/X.txt] [flags...]
# The default file is test_args/fashion_mnist_dit.txt. Flags override the file, and later flags override earlier ones.
# Relative paths in flags are relative to the repository.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
start test "$@"
