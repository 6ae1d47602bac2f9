from normrewrite.cli import main

main()
