#!/usr/bin/env bash
# Installs Debian's (or Ubuntu's) packages for some tests. Nothing is started, and no service is enabled on purpose.
#
# $ tests/install.sh slurm      # tests/system/test_slurm.py; cluster.sh runs its daemons as ordinary processes
# $ tests/install.sh browser    # tests/analysis/test_page.py
#
# Exit code 0: everything is there. 1: it isn't, and the last line says what to do.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

case "${1-}" in
    slurm)
        packages=(slurm-wlm munge shellcheck)
        programs=(munged slurmctld slurmd sbatch srun scontrol shellcheck)
        ;;
    browser)
        packages=(chromium chromium-driver)
        programs=(chromium chromedriver)
        ;;
    *)
        echo "error: say what to install: $0 slurm, or $0 browser" >&2
        exit 1
        ;;
esac

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

if [[ -z $(missing) ]]; then
    echo "${packages[*]}: already installed"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: no apt-get here; install ${packages[*]} by this system's own means" >&2
    exit 1
fi
if [[ $(id -u) != 0 ]]; then
    echo "error: installing needs root; run: sudo $0 $1" >&2
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
echo "installed ${packages[*]}"
