#!/usr/bin/env bash
# Installs what tests/system/test_slurm.py needs: Debian's (or Ubuntu's) SLURM, MUNGE and shellcheck. Nothing is started and no
# service is enabled on purpose: cluster.sh runs its own daemons, as ordinary processes, under a folder of its own.
#
# $ tests/slurm/install.sh
#
# Exit code 0: everything is there. 1: it isn't, and the last line says what to do.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

packages=(slurm-wlm munge shellcheck)

missing() {
    local program
    for program in munged slurmctld slurmd sbatch srun scontrol shellcheck; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

if [[ -z $(missing) ]]; then
    echo "SLURM is already installed: $(slurmd -V)"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: no apt-get here; install ${packages[*]} by this system's own means" >&2
    exit 1
fi
if [[ $(id -u) != 0 ]]; then
    echo "error: installing needs root; run: sudo $0" >&2
    exit 1
fi
echo "installing ${packages[*]} with apt-get; missing so far: $(missing | xargs)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
if [[ -n $(missing) ]]; then
    echo "error: apt-get ended well, but these are still not found: $(missing | xargs)" >&2
    exit 1
fi
echo "installed ${packages[*]}: $(slurmd -V)"
