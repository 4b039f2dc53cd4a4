# The static binary, tested. goarch cross-compiles it with the same Go, without a C toolchain.
{
  lib,
  # ./go.nix has one whose Go is new enough.
  buildGoModule,
  runCommand,
  # The git revision that -version and build_info show; "" if unknown.
  revision ? "",
  # GOARCH of another Linux architecture; null builds for the platform's own, and runs the tests.
  goarch ? null,
}:
let
  native = buildGoModule (finalAttrs: {
    pname = "anthropic-oauth-proxy";
    version = (import ./version.nix).proxy;

    src = lib.fileset.toSource {
      root = ../.;
      fileset = lib.fileset.difference (lib.fileset.unions [
        (lib.fileset.fileFilter (file: file.hasExt "go") ../.)
        ../go.mod
        ../go.sum
        (lib.fileset.maybeMissing ../default.pgo)
        (lib.fileset.maybeMissing ../testdata)
      ]) (lib.fileset.maybeMissing ../e2e);
    };

    # Written by `nix run .#generate`.
    vendorHash = lib.fileContents ./vendor-hash;

    env.CGO_ENABLED = 0;
    # Two features of tailscale's packages that a client has no use for: 1.7 MB.
    tags = [
      "ts_omit_debugeventbus"
      "ts_omit_syspolicy"
    ];
    ldflags = [
      "-s"
      "-w"
    ]
    ++ lib.optional (revision != "") "-X main.revision=${revision}";

    # -s -w leave nothing to strip, and binutils cannot read the other architecture's files.
    dontStrip = true;

    doInstallCheck = true;
    installCheckPhase = ''
      runHook preInstallCheck
      $out/bin/anthropic-oauth-proxy -version | grep -F ${lib.escapeShellArg revision}
      go version -m $out/bin/anthropic-oauth-proxy | grep CGO_ENABLED=0
      runHook postInstallCheck
    '';

    # What it prints as its configuration is one that it reads, and says the same.
    passthru.tests.configuration = runCommand "anthropic-oauth-proxy-configuration" { } ''
      proxy=${lib.getExe finalAttrs.finalPackage}
      $proxy -check-config >first.toml
      $proxy -check-config -config first.toml >$out
      cmp first.toml $out
    '';

    # No homepage, changelog or maintainers: there is no repository that everybody can reach yet.
    meta = {
      description = "Anthropic API proxy on a tailnet that adds the OAuth beta header";
      license = lib.licenses.mit;
      mainProgram = "anthropic-oauth-proxy";
      platforms = lib.platforms.unix;
    };
  });

  # buildGoModule overwrites a GOARCH given to it, and `go install` puts a foreign binary into a
  # folder of its own.
  cross = native.overrideAttrs (old: {
    env = old.env // {
      GOARCH = goarch;
    };
    doCheck = false;
    doInstallCheck = false;
    postInstall = ''
      if [ -d $out/bin/linux_${goarch} ]; then
        mv $out/bin/linux_${goarch}/* $out/bin/
        rmdir $out/bin/linux_${goarch}
      fi
    '';
  });
in
if goarch == null then native else cross
