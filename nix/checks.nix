# What `nix flake check` builds.
{
  pkgs,
  # This system's packages of the flake, its NixOS module, and the git revision.
  packages,
  nixosModule,
  revision,
}:
let
  inherit (pkgs) lib runCommand stdenv;
  inherit (packages.default) pname version;

  # The image's configuration, its files, and that it can run without a store.
  image =
    goarch: archive:
    runCommand "image-${goarch}-check"
      {
        nativeBuildInputs = [ pkgs.jq ];
        expected = builtins.toJSON {
          architecture = goarch;
          os = "linux";
          config = {
            Entrypoint = [ "/bin/${pname}" ];
            User = "65532:65532";
            ExposedPorts."8080/tcp" = { };
            Labels = {
              "org.opencontainers.image.title" = pname;
              "org.opencontainers.image.description" = packages.default.meta.description;
              "org.opencontainers.image.licenses" = packages.default.meta.license.spdxId;
              "org.opencontainers.image.version" = version;
            }
            // lib.optionalAttrs (revision != "") { "org.opencontainers.image.revision" = revision; };
          };
        };
        passAsFile = [ "expected" ];
        # The binary runs where the builder is of the image's architecture.
        runs = stdenv.hostPlatform.go.GOARCH == goarch;
      }
      ''
        fail() { echo "image-${goarch}: $*" >&2; exit 1; }

        mkdir archive root
        tar -xf ${archive} -C archive
        image=$(jq .[0] archive/manifest.json)
        config=archive/$(jq -r .Config <<<"$image")
        layers=$(jq -r '.Layers[]' <<<"$image")

        [ "$(jq -c .RepoTags <<<"$image")" = '["${pname}:${version}"]' ] || fail "wrong reference: $image"
        jq -S '{architecture, os, config}' "$config" >is
        jq -S . "$expectedPath" >should
        diff should is || fail "the configuration differs"
        created=$(jq -r .created "$config")
        [[ $created = 1970-01-01T00:00:01* ]] || fail "created at $created"
        [ "$(wc -l <<<"$layers")" -le 2 ] || fail "more than two layers: $layers"

        for layer in $layers; do
          tar -tvf "archive/$layer" --numeric-owner --utc --full-time
          tar -xf "archive/$layer" -C root
        done >listing
        awk '$2 != "0/0" || $4 !~ /^(1970|1980)-01-01$/' listing >odd
        [ ! -s odd ] || fail "wrong owner or time: $(cat odd)"

        (cd root; find . ! -type d | LC_ALL=C sort) >is
        printf '%s\n' ./bin/${pname} ./etc/ssl/certs/ca-certificates.crt >should
        diff should is || fail "the files differ"
        [ "$(stat -c %a root/bin/${pname})" = 755 ] || fail "the binary's mode is wrong"
        [ "$(stat -c %a root/etc/ssl/certs/ca-certificates.crt)" = 644 ] || fail "the certificates' mode is wrong"
        [ "$(grep -c 'BEGIN CERTIFICATE' root/etc/ssl/certs/ca-certificates.crt)" -ge 100 ] || fail "certificates are missing"
        if grep -aoE "$NIX_STORE/[0-9a-df-z][0-9a-z]{31}-[^/]*" root/bin/${pname}; then fail "store paths are left"; fi
        if [ -n "$runs" ]; then
          env -i root/bin/${pname} -version | grep -F ${version} || fail "-version does not name the version"
        fi

        bytes=$(stat -c %s ${archive})
        [ "$bytes" -le 5000000 ] || fail "$bytes bytes are more than expected"
        echo "image-${goarch}: $bytes bytes compressed" | tee $out
      '';

  # nixpkgs has pkgs.nixos, all of NixOS' module system. A stand-in for nixpkgs may not.
  nixos-module =
    if pkgs ? nixos then
      let
        machine = pkgs.nixos {
          imports = [ nixosModule ];
          boot.isContainer = true;
          system.stateVersion = lib.trivial.release;
          services.tailscale.enable = true;
          services.${pname} = {
            enable = true;
            openFirewall = true;
            settings.proxy.drain_timeout_secs = 7;
          };
          systemd.services.${pname}.serviceConfig.CPUQuota = "150%";
        };
        unit = machine.config.systemd.units."${pname}.service".unit;
      in
      assert machine.config.networking.firewall.interfaces.tailscale0.allowedTCPPorts == [ 8080 ];
      runCommand "nixos-module-check" { } ''
        unit=${unit}/${pname}.service
        grep -E '^After=.*tailscaled.service' "$unit"
        grep -x 'TimeoutStopSec=12' "$unit"
        grep -x 'DynamicUser=true' "$unit"
        grep -x 'Environment="GOMAXPROCS=2"' "$unit"
        cp "$unit" $out
      ''
    else
      assert lib.isFunction nixosModule;
      runCommand "nixos-module-check" { } ''
        echo "NOT evaluated: this nixpkgs has no module system. All that is known: the file parses." | tee $out
      '';
in
{
  package = packages.default;
  inherit (packages.default.tests) configuration;

  manifests = runCommand "manifests-check" { } ''
    diff -r ${../k8s} ${packages.manifests} || {
      echo "k8s/ is not what nix/manifests.nix makes (<: k8s/, >: nix/): nix run .#generate" >&2
      exit 1
    }
    touch $out
  '';
}
// lib.optionalAttrs stdenv.hostPlatform.isLinux {
  image-amd64 = image "amd64" packages.image-amd64;
  image-arm64 = image "arm64" packages.image-arm64;
  inherit nixos-module;
}
