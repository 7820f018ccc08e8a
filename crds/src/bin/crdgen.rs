//! Prints the CustomResourceDefinitions as YAML.

use std::process::ExitCode;

fn main() -> ExitCode {
    match crds::yaml() {
        Ok(yaml) => {
            print!("{yaml}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("write the CRD as YAML: {error}");
            ExitCode::FAILURE
        }
    }
}
