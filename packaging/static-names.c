/* For programs that are linked with glibc statically: names of hosts, users and groups come from files
 * and the DNS, which such a program can look up by itself, whatever nsswitch.conf says. Every other source
 * is a module that glibc would load at run time, with the rest of the glibc of the machine it finds itself
 * on: of another version, that ends the program or worse. Linked in by scripts/release. */
extern int __nss_configure_lookup(const char *database, const char *services);

__attribute__((constructor)) static void names_from_files_and_dns(void)
{
	__nss_configure_lookup("hosts", "files dns");
	__nss_configure_lookup("services", "files");
	__nss_configure_lookup("passwd", "files");
	__nss_configure_lookup("group", "files");
}
