"""REFINE against the next-token loss on recall of multi-token values, with ablations; see README.md."""

from refine_verl.command.quiet import quieten_third_parties

quieten_third_parties()  # here, so that it holds in the processes of jobs, too
