# The container image, a docker-archive: the binary, CA certificates, and nothing else.
{
  lib,
  cacert,
  dockerTools,
  runCommand,
  # ./package.nix, built for goarch.
  package,
  goarch,
  # The git revision; "" if unknown.
  revision ? "",
}:
let
  # nixpkgs' Go writes the store paths of tzdata, mailcap and iana-etc into what it builds, as the
  # places to look first. The program reads none of them, and the image does without: overwrite
  # their hashes, as nixpkgs' nuke-refs does. allowedReferences proves that none is left.
  files = runCommand "${package.pname}-files" { allowedReferences = [ ]; } ''
    install -Dm755 ${lib.getExe package} $out/bin/${package.pname}
    LC_ALL=C sed -i -E "s|$NIX_STORE/[0-9a-z]{32}-|$NIX_STORE/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-|g" $out/bin/${package.pname}
    install -Dm644 ${cacert}/etc/ssl/certs/ca-bundle.crt $out/etc/ssl/certs/ca-certificates.crt
  '';
in
dockerTools.buildLayeredImage {
  name = package.pname;
  tag = package.version;
  architecture = goarch;
  # Real files in one layer, rather than links into a store of which nothing else is there.
  extraCommands = ''
    cp -r ${files}/. .
    chmod -R u+w .
  '';
  maxLayers = 2;
  created = "1970-01-01T00:00:01Z";
  config = {
    Entrypoint = [ "/bin/${package.pname}" ];
    User = "65532:65532";
    ExposedPorts."8080/tcp" = { };
    Labels = lib.filterAttrs (_: value: value != "") {
      "org.opencontainers.image.title" = package.pname;
      "org.opencontainers.image.description" = package.meta.description;
      "org.opencontainers.image.source" = package.meta.homepage or "";
      "org.opencontainers.image.licenses" = package.meta.license.spdxId;
      "org.opencontainers.image.revision" = revision;
      "org.opencontainers.image.version" = package.version;
    };
  };
}
