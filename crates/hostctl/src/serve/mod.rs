//! serve
use crate::args::Arguments;
use crate::error::Error;
/// x
pub fn serve(_: &Arguments) -> Result<(), Error> {
    Ok(())
}
