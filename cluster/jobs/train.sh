#!/usr/bin/env bash
# Submit `recray train ARGUMENTS` to the cluster that $RAY_API_SERVER_ADDRESS names, and follow it.
exec "$(dirname "${BASH_SOURCE[0]}")/submit.sh" train "$@"
